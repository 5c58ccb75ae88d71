"""Documents of text of one source, in one lane, to full rows with random spans.

A row is full: a document that does not fit goes on in the next row, without a token lost or repeated. The
state is a place in the order and the number of tokens consumed of the document there. Where spans are in an
encoder's own tokens a row grows or shrinks by them: what no longer fits is given back for the next row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from metalm.config.model_schema import TEXT
from metalm.data.documents.retokenize import SpanRetokenizer
from metalm.data.documents.spans import SpanSampler, text_document
from metalm.data.failures import FailureGuard
from metalm.data.row import NO_TOKEN, Row, lay_out
from metalm.data.sample_stream import Order, Place, RowCounters, SampleStream
from metalm.data.sources import Source
from metalm.document import Document


class _Stretch(NamedTuple):
    """What a row holds of a document."""

    start: int
    """Position of its first token in the row."""
    place: Place
    text: np.ndarray
    """The whole document's, without `<s>` and `</d>`."""
    consumed: int
    """Of the document's tokens, with `<s>` and `</d>`, in the rows before."""
    end: int
    """Of the document's tokens, in the rows before and this one."""

    @property
    def body(self) -> np.ndarray:
        """Its tokens in this row, without `<s>` and `</d>`."""
        return self.text[max(self.consumed - 1, 0) : self.end - 1]

    @property
    def body_start(self) -> int:
        """Position of the body in the row."""
        return self.start + self.begins

    @property
    def body_end(self) -> int:
        """Position behind the body."""
        return self.following - self.ends

    @property
    def begins(self) -> bool:
        """Whether it has `<s>`."""
        return self.consumed == 0

    @property
    def ends(self) -> bool:
        """Whether it has `</d>`."""
        return self.end == len(self.text) + 2

    @property
    def following(self) -> int:
        """Position of what follows it in the row."""
        return self.start + self.end - self.consumed


class ContinuousPacker:
    """Packs documents `<s> text </d>` end to end into full rows, with spans if an encoder reads them."""

    def __init__(
        self,
        source: Source,
        order: Order,
        lane: int,
        *,
        sequence_length: int,
        spans: SpanSampler,
        max_consecutive_failures: int,
        retokenizer: SpanRetokenizer | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.counters = RowCounters.from_state(state["counters"]) if state else RowCounters()
        self._source, self._length, self._spans = source, sequence_length, spans
        self._reader = source.readers.get(TEXT)
        guard = FailureGuard(self.counters.skipped, max_consecutive_failures)
        self._place = Place(*state["place"]) if state else Place(order.first_block(lane), 0)
        self._consumed: int = state["consumed"] if state else 0
        upcoming = Place(self._place.block, self._place.position + 1) if self._consumed else self._place
        self._stream = SampleStream(source, order, lane, source.token_ids, guard, upcoming)
        self._text = self._stream.read_again(self._place)[1] if self._consumed else None
        self._retokenizer = retokenizer
        self._given_back: list[_Stretch] = []

    def state(self) -> dict[str, Any]:
        """Where the next row begins, as JSON holds it."""
        place = self._place
        if self._text is None:
            place = self._given_back[0].place if self._given_back else self._stream.place
        return {"place": list(place), "consumed": self._consumed, "counters": self.counters.state()}

    def next_row(self) -> Row | None:
        """The next row; shorter than `sequence_length` or None only at the end of a finite order."""
        stretches: list[_Stretch] = []
        filled = 0
        while filled < self._length and self._has_document():
            stretches.append(self._take(filled))
            filled = stretches[-1].following
        if not filled:
            return None
        documents = self._with_spans(stretches, filled)
        if self._retokenizer is not None:
            documents, taken = self._retokenizer.refit(documents, self._length)
            self._give_back(stretches, taken)
        row = lay_out(documents, self._source.tokenizer, self._source.source_id, self._upcoming_token())
        self.counters.count_row(row, self._length)
        return row

    def _with_spans(self, stretches: list[_Stretch], filled: int) -> list[Document]:
        bounds: list[tuple[int, int]] = []
        if self._reader is not None:
            bodies = [(stretch.body_start, stretch.body_end) for stretch in stretches]
            bounds = self._spans.sample(bodies, filled, self.counters.rows)
        documents = []
        first = 0
        for stretch in stretches:
            start, last = stretch.body_start, first
            while last < len(bounds) and bounds[last][0] < stretch.body_end:
                last += 1
            own = [(span_start - start, span_end - start) for span_start, span_end in bounds[first:last]]
            documents.append(
                text_document(stretch.body, own, self._reader, begins=stretch.begins, ends=stretch.ends)
            )
            first = last
        return documents

    def _has_document(self) -> bool:
        if self._text is None:
            if self._given_back:
                stretch = self._given_back.pop(0)
                self._place, self._text = stretch.place, stretch.text
            else:
                read = self._stream.read_next()
                if read is None:
                    return False
                self._place, _, self._text = read
            self.counters.samples += 1
        return True

    def _take(self, filled: int) -> _Stretch:
        """What fits of the current document behind `filled` tokens of the row."""
        assert self._text is not None
        consumed, size = self._consumed, len(self._text) + 2
        end = min(size, consumed + self._length - filled)
        stretch = _Stretch(filled, self._place, self._text, consumed, end)
        if end == size:
            self._text, self._consumed = None, 0
        else:
            self._consumed = end
        return stretch

    def _give_back(self, stretches: list[_Stretch], taken: int) -> None:
        """Go back to the document that holds the row's token `taken`, the first that is not in the row."""
        if taken == stretches[-1].following:
            return
        within = max(number for number, stretch in enumerate(stretches) if stretch.start <= taken)
        current, later = stretches[within], stretches[within + 1 :]
        self._given_back = later + self._given_back
        self.counters.samples -= len(later)
        self._place, self._text = current.place, current.text
        self._consumed = current.consumed + taken - current.start
        if not self._consumed:
            self._given_back.insert(0, current)
            self.counters.samples -= 1
            self._text = None

    def _upcoming_token(self) -> int:
        if self._text is None:
            return NO_TOKEN
        if self._consumed == len(self._text) + 1:
            return self._source.tokenizer.document_id
        return int(self._text[self._consumed - 1])
