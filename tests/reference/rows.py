"""Rows as a person would write them down: documents of tokens, and which runs of them are spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

START, PARAGRAPH, DOCUMENT, PAD = 0, 1, 2, 3


@dataclass(frozen=True)
class Span:
    """Positions [start, end) of a document; the first `len(patches)` of them are image patches."""

    encoder: str
    start: int
    end: int
    patches: np.ndarray | None = None  # [n, patch values] uint8


@dataclass(frozen=True)
class Document:
    """One document; at patch positions stands the end-of-paragraph token."""

    tokens: list[int]
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class PlainRow:
    """Documents packed into one row, all of one source."""

    documents: list[Document]
    source: int
    dropout_seed: int = 0


def loss_weights(
    num_tokens: int,
    document_ends: Sequence[int],
    spans: Sequence[Sequence[int]],
    *,
    goes_on: bool = False,
    token_weights: Sequence[float] | None = None,
) -> np.ndarray:
    """Weights [num_tokens] of the losses in a row; position p predicts the token at p + 1 (PAPER section 3).

    A position is trained unless it is inside a span before its last position, or the last position of a
    document that ends in the row.

    Args:
        document_ends: exclusive.
        spans: start and end (exclusive) of each, of all encoders.
        goes_on: the last document goes on in the next row.
        token_weights: [num_tokens + 1] of the tokens and of the next row's first; None: all are learnt.
    """
    weights = np.zeros(num_tokens, np.float32)
    for p in range(num_tokens):
        in_span = any(start <= p < end - 1 for start, end in spans)
        is_last = p + 1 in document_ends and not (goes_on and p + 1 == num_tokens)
        if not in_span and not is_last:
            weights[p] = 1.0 if token_weights is None else token_weights[p + 1]
    return weights


def random_rows(seed: int, num_rows: int, vocab_size: int, length: int) -> list[PlainRow]:
    """Rows of two documents: the first half of the rows are pairs, the second half text with spans.

    So of two data-parallel ranks one has no image, and trained positions differ from row to row.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        cut = int(generator.integers(12, length - 12))
        sizes = (cut, int(generator.integers(10, length - cut + 1)))
        make = _pair if number < num_rows // 2 else _text
        documents = [make(generator, size, vocab_size) for size in sizes]
        rows.append(PlainRow(documents, source=1 if number < num_rows // 2 else 0))
    return rows


def lonely_rows(seed: int, vocab_size: int) -> list[PlainRow]:
    """Two rows each of text with spans, of pairs, of nothing, and of text without spans."""
    generator = np.random.default_rng(seed)
    texts = [[_text(generator, 30, vocab_size)] for _ in range(4)]
    plain = [[Document(document.tokens) for document in documents] for documents in texts[2:]]
    pairs = [[_pair(generator, 20, vocab_size), _pair(generator, 16, vocab_size)] for _ in range(2)]
    sources = (0, 0, 1, 1, 0, 0, 0, 0)
    rows = [*texts[:2], *pairs, [], [], *plain]
    return [PlainRow(documents, source) for documents, source in zip(rows, sources, strict=True)]


def _pair(generator: np.random.Generator, size: int, vocab_size: int) -> Document:
    prefix = int(generator.integers(0, 4))
    caption = generator.integers(4, vocab_size, size - 6).tolist()
    patches = generator.integers(0, 256, (4, 48), dtype=np.uint8)
    tokens = [START, *[PARAGRAPH] * 4, *caption, DOCUMENT]
    return Document(tokens, [Span("image", 1, 5 + prefix, patches)])


def _text(generator: np.random.Generator, size: int, vocab_size: int) -> Document:
    tokens = [START, *generator.integers(4, vocab_size, size - 2).tolist(), DOCUMENT]
    first = int(generator.integers(1, 4))
    return Document(tokens, [Span("text", first, first + int(generator.integers(2, 6)))])
