"""Documents of one source, in one lane, to packed rows with spans.

A row is full: a document that does not fit goes on in the next row, without a token lost or repeated. The
state is a place in the order and the number of tokens consumed of the document there. Where spans are in an
encoder's own tokens a row grows or shrinks by them: what no longer fits is given back for the next row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from metalm.data.failures import FailureGuard
from metalm.data.retokenize import SpanRetokenizer
from metalm.data.rows import NO_TOKEN, Row, RowSpans
from metalm.data.sample_stream import Order, Place, RowCounters, SampleStream
from metalm.data.sources import Source
from metalm.data.spans import SpanSampler


class _Piece(NamedTuple):
    """A document in the row that is being filled."""

    first: int
    """Position of its first token in the row."""
    place: Place
    body: np.ndarray
    consumed: int
    """Of its tokens, in rows before."""


class TextPacker:
    """Packs documents `<s> body </d>` end to end into full rows, with spans if the source has an encoder."""

    def __init__(
        self,
        source: Source,
        order: Order,
        lane: int,
        *,
        sequence_length: int,
        spans: SpanSampler | None,
        max_consecutive_failures: int,
        retokenizer: SpanRetokenizer | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.counters = RowCounters.from_state(state["counters"]) if state else RowCounters()
        self._source, self._length, self._spans = source, sequence_length, spans
        guard = FailureGuard(self.counters.skipped, max_consecutive_failures)
        self._place = Place(*state["place"]) if state else Place(0, 0)
        self._consumed: int = state["consumed"] if state else 0
        upcoming = Place(self._place.block, self._place.position + 1) if self._consumed else self._place
        self._stream = SampleStream(source, order, lane, source.document, guard, upcoming)
        self._body = self._stream.read_again(self._place)[1] if self._consumed else None
        self._retokenizer = retokenizer
        self._pieces: list[_Piece] = []
        self._given_back: list[_Piece] = []

    def state(self) -> dict[str, Any]:
        """Where the next row begins, as JSON holds it."""
        place = self._place
        if self._body is None:
            place = self._given_back[0].place if self._given_back else self._stream.place
        return {"place": list(place), "consumed": self._consumed, "counters": self.counters.state()}

    def next_row(self) -> Row | None:
        """The next row; shorter than `sequence_length` or None only at the end of a finite order."""
        tokens = np.empty(self._length, np.int32)
        ends: list[int] = []
        bodies: list[tuple[int, int]] = []
        filled = 0
        self._pieces = []
        while filled < self._length and self._has_document():
            filled = self._copy_document(tokens, filled, bodies)
            ends.append(filled)
        if not filled:
            return None
        tokens = tokens[:filled]
        spans = {}
        if self._spans is not None and self._source.config.encoder is not None:
            bounds, ids = self._spans.sample(bodies, filled, self.counters.rows), None
            if self._retokenizer is not None:
                refitted = self._retokenizer.refit(tokens, ends, bounds, self._length)
                tokens, ends = refitted.tokens, refitted.document_ends
                bounds, ids = refitted.bounds, refitted.ids
                self._give_back(refitted.taken, filled)
            if len(bounds):
                no_patches = np.zeros(len(bounds), np.int64)
                spans[self._source.config.encoder] = RowSpans(bounds, no_patches, ids=ids)
                self.counters.span_tokens += int((bounds[:, 1] - bounds[:, 0]).sum())
        self.counters.rows += 1
        self.counters.tokens += len(tokens)
        self.counters.padding_tokens += self._length - len(tokens)
        return Row(tokens, ends, self._upcoming_token(), spans, self._source.source_id)

    def _has_document(self) -> bool:
        if self._body is None:
            if self._given_back:
                piece = self._given_back.pop(0)
                self._place, self._body = piece.place, piece.body
            else:
                read = self._stream.read_next()
                if read is None:
                    return False
                self._place, _, self._body = read
            self.counters.samples += 1
        return True

    def _give_back(self, taken: int, filled: int) -> None:
        """Go back to the document that holds the row's token `taken`, the first that is not in the row."""
        if taken == filled:
            return
        within = max(number for number, piece in enumerate(self._pieces) if piece.first <= taken)
        current, later = self._pieces[within], self._pieces[within + 1 :]
        self._given_back = later + self._given_back
        self.counters.samples -= len(later)
        self._place, self._body = current.place, current.body
        self._consumed = current.consumed + taken - current.first
        if not self._consumed:
            self._given_back.insert(0, current)
            self.counters.samples -= 1
            self._body = None

    def _copy_document(self, tokens: np.ndarray, filled: int, bodies: list[tuple[int, int]]) -> int:
        """Copies what fits of the current document to tokens[filled:]; returns the new end."""
        body, consumed = self._body, self._consumed
        assert body is not None
        self._pieces.append(_Piece(filled, self._place, body, consumed))
        if consumed == 0:
            tokens[filled] = self._source.tokenizer.start_id
            filled, consumed = filled + 1, 1
        first = consumed - 1
        count = min(len(body) - first, len(tokens) - filled)
        tokens[filled : filled + count] = body[first : first + count]
        bodies.append((filled, filled + count))
        filled, consumed = filled + count, consumed + count
        if consumed == len(body) + 1 and filled < len(tokens):
            tokens[filled] = self._source.tokenizer.document_id
            self._body, self._consumed = None, 0
            return filled + 1
        self._consumed = consumed
        return filled

    def _upcoming_token(self) -> int:
        if self._body is None:
            return NO_TOKEN
        if self._consumed == len(self._body) + 1:
            return self._source.tokenizer.document_id
        return int(self._body[self._consumed - 1])
