"""Pairs of an image or a clip with text, of one source, in one lane, to packed rows.

Pairs are not cut, so rows have padding; the packer looks some pairs ahead and takes those that fill a row
best. The state is a place in the order and the places of the pairs that wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from metalm.data.failures import BadSample, FailureGuard
from metalm.data.index import SampleLocation
from metalm.data.media import MediaReader
from metalm.data.rows import Row, RowSpans
from metalm.data.sample_stream import Order, Place, RowCounters, SampleStream
from metalm.data.sources import Source
from metalm.data.streams import Stream
from metalm.errors import ConfigError

PAIRS_AHEAD = 16
"""Pairs among which a packer looks for the one that fills a row best."""


class Pair(NamedTuple):
    """A pair of a row: everything but its image or clip."""

    location: SampleLocation
    num_patches: int
    ids: np.ndarray  # [n] the caption's tokens
    prefix_length: int
    """Leading caption tokens that are encoded together with the patches."""

    @property
    def size(self) -> int:
        """Positions that it takes in a row."""
        return self.num_patches + len(self.ids) + 2


class _Seen(NamedTuple):
    """What is read of a pair before it waits."""

    captions: list[str]
    media: memoryview
    num_patches: int


class _Waiting(NamedTuple):
    """A pair that waits for its row. Its image or clip is decoded when it gets there."""

    place: Place
    pair: Pair
    media: memoryview
    truncated: bool


class PairPacker:
    """Packs pairs `<s> [image or clip + prefix] rest </d>` whole into rows."""

    def __init__(
        self,
        source: Source,
        order: Order,
        lane: int,
        *,
        reader: MediaReader,
        max_text_positions: int,
        sequence_length: int,
        draws: Stream,
        max_consecutive_failures: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.counters = RowCounters.from_state(state["counters"]) if state else RowCounters()
        self._source, self._reader, self._length, self._draws = source, reader, sequence_length, draws
        self._max_text_positions = max_text_positions
        longest_caption(reader.max_patches, sequence_length)
        # A short clip costs its encoder as much as a whole one, so no more of them go to a row.
        self._max_pairs = max(1, sequence_length // reader.max_patches)
        guard = FailureGuard(self.counters.skipped, max_consecutive_failures)
        place = Place(*state["place"]) if state else Place(0, 0)
        self._stream = SampleStream(source, order, lane, self._look, guard, place)
        self._media_guard = FailureGuard(self.counters.skipped, max_consecutive_failures)
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
        """The next row: the pair that waits longest, then each time the largest that still fits."""
        taken: list[_Waiting] = []
        media: list[np.ndarray] = []
        room = self._length
        while len(taken) < self._max_pairs:
            self._look_ahead()
            waiting = self._take_best(room) if taken else self._waiting.pop(0)
            if waiting is None:
                break
            try:
                media.append(self._reader.read(waiting.media))
            except BadSample as failure:
                location = waiting.pair.location
                shard = self._source.reader.path_of(location.shard)
                self._media_guard.failed(failure.cause, shard, location.sample)
                continue
            self._media_guard.passed()
            taken.append(waiting)
            room -= waiting.pair.size
        self.counters.rows += 1
        self.counters.samples += len(taken)
        self.counters.tokens += self._length - room
        self.counters.padding_tokens += room
        self.counters.truncated_captions += sum(waiting.truncated for waiting in taken)
        row = pair_row([waiting.pair for waiting in taken], media, self._source)
        (spans,) = row.spans.values()
        self.counters.span_tokens += int((spans.bounds[:, 1] - spans.bounds[:, 0]).sum())
        return row

    def _look_ahead(self) -> None:
        while len(self._waiting) < PAIRS_AHEAD:
            read = self._stream.read_next()
            assert read is not None
            self._waiting.append(self._wait(*read))

    def _take_best(self, room: int) -> _Waiting | None:
        fitting = [n for n, waiting in enumerate(self._waiting) if waiting.pair.size <= room]
        if not fitting:
            return None
        return self._waiting.pop(max(fitting, key=lambda n: self._waiting[n].pair.size))

    def _look(self, location: SampleLocation) -> _Seen:
        media = self._source.media(location)
        return _Seen(self._source.captions(location), media, self._reader.count_patches(media))

    def _wait(self, place: Place, location: SampleLocation, seen: _Seen) -> _Waiting:
        which, prefix = self._draws.uniforms(place.ordinal, 2)
        caption = seen.captions[int(which * len(seen.captions))]
        ids = self._source.tokenizer.encode([caption])[0]
        kept = ids[: longest_caption(seen.num_patches, self._length)]
        prefix_length = int(prefix * min(len(kept), self._max_text_positions + 1))
        pair = Pair(location, seen.num_patches, kept, prefix_length)
        return _Waiting(place, pair, seen.media, truncated=len(kept) < len(ids))


def longest_caption(max_patches: int, sequence_length: int) -> int:
    """Caption tokens that fit in a row beside an image or clip of so many patches, `<s>` and `</d>`.

    Raises:
        ConfigError: there is no room for a caption.
    """
    longest = sequence_length - max_patches - 2
    if longest < 1:
        raise ConfigError(
            f"data.sequence_length is {sequence_length}: {max_patches} patches, <s> and </d> leave no room "
            "for a caption"
        )
    return longest


def pair_row(pairs: list[Pair], media: list[np.ndarray], source: Source) -> Row:
    """The row [sum of the pairs' sizes] of pairs with what `MediaReader.read` gives, one after another."""
    tokenizer = source.tokenizer
    assert source.config.encoder is not None
    parts: list[Any] = []
    for pair in pairs:
        placeholders = np.full(pair.num_patches, tokenizer.paragraph_id)
        parts += [[tokenizer.start_id], placeholders, pair.ids, [tokenizer.document_id]]
    ends = np.cumsum([pair.size for pair in pairs])
    first = np.concatenate(([0], ends[:-1])) + 1
    num_patches = np.array([pair.num_patches for pair in pairs])
    lengths = num_patches + [pair.prefix_length for pair in pairs]
    spans = RowSpans(
        bounds=np.stack([first, first + lengths], axis=1),
        num_patches=num_patches,
        media=np.concatenate(media),
    )
    tokens = np.concatenate(parts).astype(np.int32)
    return Row(tokens, ends.tolist(), spans={source.config.encoder: spans}, source_id=source.source_id)
