"""Documents laid out in a row: tokens, loss weights, spans and where documents end.

Rows are small and plain, so they travel between processes; what follows from them (labels, positions,
intervals) is computed for a whole micro-batch at once in `collate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from metalm.document import Document, Part

NO_TOKEN = -1


@dataclass(frozen=True)
class RowSpans:
    """The K spans of a row that go through one encoder."""

    bounds: np.ndarray  # [K, 2] int64; start and end (exclusive) in the row
    num_patches: np.ndarray  # [K] int64; leading positions of the span that are vectors of its image or clip
    media: np.ndarray | None = None
    """Of all spans end to end: what the encoder is fed of images or clips, such as patches or features."""
    ids: np.ndarray | None = None  # [sum of lengths] int64, of an encoder with a tokenizer of its own


@dataclass(frozen=True)
class Row:
    """One row of at most `sequence_length` tokens."""

    tokens: np.ndarray  # [n] int32
    loss_weights: np.ndarray  # [n] float32, of the loss of predicting the next token at each position
    document_ends: list[int]  # exclusive ends of the documents, which tile the row
    next_token: int = NO_TOKEN
    """First token of the last document's continuation in the next row, if it goes on there."""
    spans: dict[str, RowSpans] = field(default_factory=dict)  # by encoder
    source_id: int = 0
    targets: np.ndarray | None = None
    """[n] int32, what each position predicts; NO_TOKEN: the next token, as all do where there is none."""
    dropout_seed: int = 0
    """What the model drops in this row is drawn from it."""


def empty_row() -> Row:
    """A row of padding, which counts for nothing."""
    return Row(np.empty(0, np.int32), np.empty(0, np.float32), [])


class FrameIds(Protocol):
    """The tokens around documents, which a tokenizer has."""

    @property
    def start_id(self) -> int:
        """Of `<s>`."""
        ...

    @property
    def document_id(self) -> int:
        """Of `</d>`."""
        ...


class _Span(NamedTuple):
    start: int
    end: int
    parts: tuple[Part, ...]


def lay_out(
    documents: Sequence[Document], frame: FrameIds, source_id: int = 0, next_token: int = NO_TOKEN
) -> Row:
    """Lay documents end to end in one row.

    Position p has the weight of the token that it predicts, the one at p + 1, if that is of the same document
    and p is not inside a span. A span's last position is outside in this sense: it predicts what follows
    (PAPER section 3, which is the case of weight 1 everywhere).

    Args:
        documents: decoded (see `Document.decoded`); only the last may go on in the next row.
        next_token: the first token there.
    """
    tokens: list[np.ndarray] = []
    weighted: list[tuple[int, int, float]] = []  # tokens of another weight than 1
    ends: list[int] = []
    spans: dict[str, list[_Span]] = {}
    targeted: list[tuple[int, np.ndarray]] = []
    start, end = (np.array([token], np.int32) for token in (frame.start_id, frame.document_id))
    at = 0
    for document in documents:
        if document.begins:
            tokens.append(start)
            at += 1
        previous: Part | None = None
        for part in document.parts:
            tokens.append(part.tokens)
            if part.weight != 1.0:
                weighted.append((at, at + len(part), part.weight))
            if part.targets is not None:
                targeted.append((at, part.targets))
            if part.reader is not None and len(part):
                of_reader = spans.setdefault(part.reader, [])
                if previous is not None and previous.reader == part.reader and not part.is_media:
                    last = of_reader[-1]
                    of_reader[-1] = _Span(last.start, at + len(part), (*last.parts, part))
                else:
                    of_reader.append(_Span(at, at + len(part), (part,)))
            if part.reader is None or len(part):
                previous = part
            at += len(part.tokens)
        if document.ends:
            tokens.append(end)
            if document.last_weight != 1.0:
                weighted.append((at, at + 1, document.last_weight))
            at += 1
        ends.append(at)
    loss_weights = _loss_weights(at, weighted, ends, spans)
    if next_token != NO_TOKEN:
        loss_weights[-1] = documents[-1].last_weight
    return Row(
        tokens=np.concatenate(tokens).astype(np.int32, copy=False),
        loss_weights=loss_weights,
        document_ends=ends,
        next_token=next_token,
        spans={reader: _row_spans(found) for reader, found in spans.items()},
        source_id=source_id,
        targets=_row_targets(at, targeted) if targeted else None,
    )


def _row_targets(num_tokens: int, targeted: list[tuple[int, np.ndarray]]) -> np.ndarray:
    targets = np.full(num_tokens, NO_TOKEN, np.int32)
    for start, wanted in targeted:
        targets[start - 1 : start - 1 + len(wanted)] = wanted
    return targets


def _loss_weights(
    num_tokens: int,
    weighted: list[tuple[int, int, float]],
    ends: list[int],
    spans: dict[str, list[_Span]],
) -> np.ndarray:
    """Of the token behind each position, 0 where that is of another document or the position in a span."""
    of_tokens = np.ones(num_tokens + 1, np.float32)
    for start, end, weight in weighted:
        of_tokens[start:end] = weight
    weights = of_tokens[1:]
    weights[[end - 1 for end in ends]] = 0.0
    for found in spans.values():
        for span in found:
            weights[span.start : span.end - 1] = 0.0
    return weights


def _row_spans(found: list[_Span]) -> RowSpans:
    bounds = np.array([(span.start, span.end) for span in found], np.int64)
    if all(span.parts[0].content is None for span in found):
        return RowSpans(bounds, np.zeros(len(found), np.int64))
    first = [span.parts[0] for span in found]
    media = [part.decoded_content for part in first if part.is_media]
    own_ids = [
        part.decoded_content
        for span in found
        for part in span.parts
        if not part.is_media and part.content is not None
    ]
    return RowSpans(
        bounds=bounds,
        num_patches=np.array([len(part) if part.is_media else 0 for part in first], np.int64),
        media=np.concatenate(media) if media else None,
        ids=np.concatenate(own_ids) if own_ids else None,
    )
