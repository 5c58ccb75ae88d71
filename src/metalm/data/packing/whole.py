"""Documents that are not cut, of one source, in one lane, to rows: pairs and examples.

Rows have padding; the packer looks some documents ahead and takes those that fill a row best. The state is a
place in the order and the places of the documents that wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from metalm.data.augmented import ImageAugmenter
from metalm.data.documents.maker import NUM_DRAWS, DocumentMaker, Made
from metalm.data.failures import FailureGuard
from metalm.data.order.streams import Stream
from metalm.data.row import Row, lay_out
from metalm.data.sample_stream import Order, Place, RowCounters, SampleStream
from metalm.data.sources import Source
from metalm.data.storage.locations import SampleLocation
from metalm.document import Document, ReadPart
from metalm.errors import BadSample

DOCUMENTS_AHEAD = 16
"""Documents among which a packer looks for the one that fills a row best."""


class _Waiting(NamedTuple):
    """A document that waits for its row. Its images and clips are decoded when it gets there."""

    place: Place
    location: SampleLocation
    made: Made
    length: int
    """Of the document, in positions."""
    num_media: int

    @property
    def document(self) -> Document:
        return self.made.document


class WholePacker:
    """Packs documents whole into rows."""

    def __init__(
        self,
        source: Source,
        order: Order,
        lane: int,
        *,
        maker: DocumentMaker,
        sequence_length: int,
        draws: Stream,
        max_consecutive_failures: int,
        augmenter: ImageAugmenter | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.counters = RowCounters.from_state(state["counters"]) if state else RowCounters()
        self._source, self._maker, self._length, self._draws = source, maker, sequence_length, draws
        # A short clip costs its encoder as much as a whole one, so no more of them go to a row.
        self._max_media = max(1, sequence_length // max(1, maker.max_vectors))
        self._augmenter = augmenter
        guard = FailureGuard(self.counters.skipped, max_consecutive_failures)
        place = Place(*state["place"]) if state else Place(order.first_block(lane), 0)
        self._stream = SampleStream(source, order, lane, self._look, guard, place)
        self._decoding_guard = FailureGuard(self.counters.skipped, max_consecutive_failures)
        self._waiting: list[_Waiting] = []
        for place in [Place(*waiting) for waiting in state["waiting"]] if state else []:
            self._waiting.append(self._wait(place, *self._stream.read_again(place)))

    def state(self) -> dict[str, Any]:
        """Where the next row begins, as JSON holds it."""
        return {
            "place": list(self._stream.place),
            "waiting": [list(waiting.place) for waiting in self._waiting],
            "counters": self.counters.state(),
        }

    def next_row(self) -> Row:
        """The next row: the document that waits longest, then each time the largest that still fits."""
        documents: list[Document] = []
        room, room_for_media = self._length, self._max_media
        while True:
            self._look_ahead()
            waiting = self._take_best(room, room_for_media) if documents else self._waiting.pop(0)
            if waiting is None:
                break
            try:
                document = waiting.document.decoded(self._read_at(waiting.place))
            except BadSample as failure:
                shard = self._source.reader.path_of(waiting.location.shard)
                self._decoding_guard.failed(failure.cause, shard, waiting.location.sample)
                continue
            self._decoding_guard.passed()
            documents.append(document)
            self.counters.truncated_captions += waiting.made.truncated_captions
            self.counters.overflowed_tokens += waiting.made.overflowed_tokens
            room -= waiting.length
            room_for_media -= waiting.num_media
        self.counters.samples += len(documents)
        row = lay_out(documents, self._source.tokenizer, self._source.source_id)
        self.counters.count_row(row, self._length)
        return row

    def _read_at(self, place: Place) -> ReadPart:
        if self._augmenter is None:
            return self._maker.read
        return self._augmenter.reading(self._maker.read, place.ordinal)

    def _look_ahead(self) -> None:
        while len(self._waiting) < DOCUMENTS_AHEAD:
            read = self._stream.read_next()
            assert read is not None
            self._waiting.append(self._wait(*read))

    def _take_best(self, room: int, room_for_media: int) -> _Waiting | None:
        fitting = [
            n
            for n, waiting in enumerate(self._waiting)
            if waiting.length <= room and waiting.num_media <= room_for_media
        ]
        if not fitting:
            return None
        return self._waiting.pop(max(fitting, key=lambda n: self._waiting[n].length))

    def _look(self, location: SampleLocation) -> Any:
        return self._maker.look(self._source, location)

    def _wait(self, place: Place, location: SampleLocation, seen: Any) -> _Waiting:
        made = self._maker.finish(seen, self._draws.uniforms(place.ordinal, NUM_DRAWS).tolist())
        document = made.document
        num_media = sum(part.is_media for part in document.parts)
        return _Waiting(place, location, made, len(document), num_media)
