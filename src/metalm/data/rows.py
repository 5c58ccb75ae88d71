"""A packed row before it is collated: tokens, where documents end, and which runs go to which encoder.

Rows are small and plain, so they travel between processes; everything that follows from them (labels,
weights, positions, intervals) is computed for a whole micro-batch at once in `collate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

NO_TOKEN = -1


@dataclass(frozen=True)
class RowSpans:
    """The K spans of a row that go through one encoder."""

    bounds: np.ndarray  # [K, 2] int; start and end (exclusive) in the row
    num_patches: np.ndarray  # [K] int; leading positions of the span that are patches of its image or clip
    media: np.ndarray | None = None
    """Of all spans end to end: uint8 [patches, patch_size * patch_size * 3], or a float32 row per clip."""
    ids: np.ndarray | None = None  # [sum of lengths] int64, of an encoder with a tokenizer of its own


@dataclass(frozen=True)
class Row:
    """One row of at most `sequence_length` tokens.

    Patch positions hold the end-of-paragraph token: it is what the position before an image or clip predicts.
    """

    tokens: np.ndarray  # [n] int32
    document_ends: list[int]  # exclusive ends of the documents, which tile the row
    next_token: int = NO_TOKEN
    """First token of the last document's continuation in the next row, if it goes on there."""
    spans: dict[str, RowSpans] = field(default_factory=dict)  # by encoder
    source_id: int = 0
    dropout_seed: int = 0
    """What the model drops in this row is drawn from it."""


def empty_row() -> Row:
    """A row of padding, which counts for nothing."""
    return Row(np.empty(0, np.int32), [])


def text_prompt(
    ids: np.ndarray, *, start_id: int, encoder: str | None = None, span: tuple[int, int] | None = None
) -> Row:
    """`<s>` and then token ids [n], left open for the decoder to go on.

    Args:
        ids: without `<s>` and `</d>`.
        encoder: the encoder that `span` goes through.
        span: start and end (exclusive) in `ids` of what is encoded instead of embedded.
    """
    tokens = np.concatenate(([start_id], ids)).astype(np.int32)
    spans = {}
    if encoder is not None and span is not None:
        bounds = np.array([[span[0] + 1, span[1] + 1]])
        spans[encoder] = RowSpans(bounds, np.zeros(1, np.int64))
    return Row(tokens, [len(tokens)], spans=spans)


def media_prompt(
    media: np.ndarray,
    num_patches: int,
    *,
    encoder: str,
    start_id: int,
    paragraph_id: int,
    prefix_ids: np.ndarray | None = None,
    ids: np.ndarray | None = None,
) -> Row:
    """`<s> [image or clip + prefix] ids`, left open for the decoder to go on.

    Args:
        media: as in `RowSpans`, of one image or clip.
        num_patches: its vectors.
        prefix_ids: text that is encoded together with it.
        ids: tokens after the span, that the decoder embeds itself.
    """
    none = np.empty(0, np.int32)
    prefix_ids, ids = (none if part is None else np.asarray(part) for part in (prefix_ids, ids))
    placeholders = np.full(num_patches, paragraph_id)
    tokens = np.concatenate(([start_id], placeholders, prefix_ids, ids)).astype(np.int32)
    spans = RowSpans(
        bounds=np.array([[1, 1 + num_patches + len(prefix_ids)]]),
        num_patches=np.array([num_patches]),
        media=media,
    )
    return Row(tokens, [len(tokens)], spans={encoder: spans})
