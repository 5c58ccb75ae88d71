"""Rows to a SemiCausalBatch: all indices that the model needs, computed for the whole micro-batch at once.

Shape letters as in `metalm.batch`; K spans, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from metalm.batch import EncoderBatch, EncoderShare, SemiCausalBatch
from metalm.config.schema import EncoderConfig, ModelConfig
from metalm.data.balance import assign_spans, span_costs
from metalm.data.rows import NO_TOKEN, Row, RowSpans

SHARE_MULTIPLE = 16
"""Shares are padded to a multiple of this many elements."""


def collate(
    rows: Sequence[Row], *, model_config: ModelConfig, sequence_length: int, tp_size: int, pad_id: int
) -> SemiCausalBatch:
    """Makes one micro-batch of rows.

    Position p predicts the token at p + 1. Trained are all positions but those inside a span before its
    last one, the last position of a document that ends in the row, and padding (PAPER section 3).

    Args:
        rows: at most `sequence_length` tokens each.
        tp_size: the spans of each encoder are split into so many shares.
        pad_id: stands where there is no token.
    """
    num_rows, length = len(rows), sequence_length
    # One column more holds the token that follows a full row.
    stream = np.full((num_rows, length + 1), pad_id, np.int64)
    for b, row in enumerate(rows):
        stream[b, : len(row.tokens)] = row.tokens
        if row.next_token != NO_TOKEN:
            stream[b, len(row.tokens)] = row.next_token
    tokens, labels = stream[:, :-1].copy(), stream[:, 1:].copy()

    start, lengths = _document_intervals(rows, length)
    attention_start = np.repeat(start, lengths).reshape(num_rows, length)
    index = np.arange(length, dtype=np.int32)
    num_tokens = np.array([len(row.tokens) for row in rows])[:, None]
    real = index < num_tokens
    attention_end = np.where(real, index + 1, 0).astype(np.int32)
    positions = np.where(real, index - attention_start, 0).astype(np.int64)

    trained = real.copy()
    spans = {name: _RowsSpans(rows, name, length) for name in model_config.encoders}
    for span in spans.values():
        if model_config.decoder.spans == "bidirectional":
            ends = span.bounds[:, 1] - span.bounds[:, 0] // length * length
            attention_end.reshape(-1)[span.positions] = np.repeat(ends, span.lengths)
        trained.reshape(-1)[span.positions] = False
        trained.reshape(-1)[span.bounds[:, 1] - 1] = True
    trained.reshape(-1)[_document_ends(rows, length)] = False
    labels[~trained] = pad_id

    encoders = {
        name: _encoder_batch(span, tokens.reshape(-1), model_config.encoders[name], tp_size, pad_id)
        for name, span in spans.items()
    }
    for span in spans.values():
        tokens.reshape(-1)[span.positions] = pad_id
    return SemiCausalBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(trained.astype(np.float32)),
        positions=torch.from_numpy(positions),
        attention_start=torch.from_numpy(attention_start),
        attention_end=torch.from_numpy(attention_end),
        source_ids=torch.tensor([row.source_id for row in rows]),
        encoders=encoders,
    )


class _RowsSpans:
    """The spans of one encoder in all rows, in flat positions row * S + p."""

    def __init__(self, rows: Sequence[Row], encoder: str, length: int) -> None:
        found: list[tuple[int, RowSpans]] = [
            (b, row.spans[encoder]) for b, row in enumerate(rows) if encoder in row.spans
        ]
        self.bounds = _concatenated([spans.bounds + b * length for b, spans in found], (0, 2))
        self.num_patches = _concatenated([spans.num_patches for _, spans in found], (0,))
        self.patches = [spans.patches for _, spans in found if spans.patches is not None]
        self.lengths = self.bounds[:, 1] - self.bounds[:, 0]
        self.positions = _ranges(self.bounds[:, 0], self.lengths)
        own_ids = [spans.ids for _, spans in found if spans.ids is not None]
        self.ids = np.concatenate(own_ids) if own_ids else None


def _document_intervals(rows: Sequence[Row], length: int) -> tuple[np.ndarray, np.ndarray]:
    """First visible position int32 and length int64 of each document, and of each row's padding."""
    starts: list[int] = []
    lengths: list[int] = []
    for row in rows:
        start = 0
        for end in row.document_ends:
            starts.append(start)
            lengths.append(end - start)
            start = end
        starts.append(0)
        lengths.append(length - start)
    return np.array(starts, np.int32), np.array(lengths, np.int64)


def _document_ends(rows: Sequence[Row], length: int) -> list[int]:
    """Flat last positions of the documents that end in their row."""
    return [
        b * length + end - 1
        for b, row in enumerate(rows)
        for end in (row.document_ends if row.next_token == NO_TOKEN else row.document_ends[:-1])
    ]


def _encoder_batch(
    spans: _RowsSpans, tokens: np.ndarray, config: EncoderConfig, tp_size: int, pad_id: int
) -> EncoderBatch:
    owners = assign_spans(span_costs(spans.lengths, config), tp_size)
    members = [np.flatnonzero(owners == rank) for rank in range(tp_size)]
    totals = [int(spans.lengths[chosen].sum()) for chosen in members]
    length = max(SHARE_MULTIPLE, -(-max(totals) // SHARE_MULTIPLE) * SHARE_MULTIPLE)
    patch_bytes = 3 * config.image.patch_size**2 if config.image else 0
    patches = np.concatenate(spans.patches) if spans.patches else np.empty((0, patch_bytes), np.uint8)
    shares, vectors, positions = [], [], []
    first_elements = np.cumsum(spans.lengths) - spans.lengths
    if config.pretrained is not None:
        pad_id = 0  # the shared tokenizer's may be beyond the encoder's vocabulary
    for rank, chosen in enumerate(members):
        docked = _ranges(spans.bounds[chosen, 0], spans.lengths[chosen])
        if spans.ids is None:
            span_tokens = tokens[docked]
        else:
            span_tokens = spans.ids[_ranges(first_elements[chosen], spans.lengths[chosen])]
        vectors.append(rank * length + np.arange(len(docked)))
        positions.append(docked)
        shares.append(
            _share(spans, chosen, span_tokens, patches, length, pad_id, config.joint_layers is not None)
        )
    return EncoderBatch(
        shares=tuple(shares),
        dock_vectors=torch.from_numpy(np.concatenate(vectors)),
        dock_positions=torch.from_numpy(np.concatenate(positions)),
    )


def _share(
    spans: _RowsSpans,
    chosen: np.ndarray,
    span_tokens: np.ndarray,
    patches: np.ndarray,
    length: int,
    pad_id: int,
    has_routes: bool,
) -> EncoderShare:
    """The elements of the chosen spans [k], packed end to end and padded to `length`."""
    lengths, num_patches = spans.lengths[chosen], spans.num_patches[chosen]
    total = len(span_tokens)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    token_ids = np.full(length, pad_id, np.int64)
    positions = np.zeros(length, np.int64)
    attention = np.zeros((2, length), np.int32)
    token_ids[:total] = span_tokens
    attention[0, :total] = np.repeat(starts, lengths)
    attention[1, :total] = np.repeat(ends, lengths)
    positions[:total] = np.arange(total) - np.repeat(starts + num_patches, lengths)
    slots = _ranges(starts, num_patches)
    if len(slots):
        token_ids[slots] = pad_id
        positions[slots] = _ranges(np.zeros_like(num_patches), num_patches)
        first_patches = np.cumsum(spans.num_patches) - spans.num_patches
        patches = patches[_ranges(first_patches[chosen], num_patches)]
    else:
        patches = patches[:0]
    if not total:
        attention[1, 0] = 1  # the dummy element sees itself
    return EncoderShare(
        token_ids=_tensor(token_ids),
        positions=_tensor(positions),
        attention_start=_tensor(attention[0]),
        attention_end=_tensor(attention[1]),
        patches=_tensor(patches),
        patch_slots=_tensor(slots),
        routes=_routes(lengths, num_patches, slots, length) if has_routes else {},
    )


def _routes(
    lengths: np.ndarray, num_patches: np.ndarray, patch_slots: np.ndarray, length: int
) -> dict[str, dict[str, Tensor]]:
    """Which elements go through which feed-forward: see `EncoderShare.routes`."""
    is_patch, is_joint = np.zeros(length, bool), np.zeros(length, bool)
    is_patch[patch_slots] = True
    is_joint[: lengths.sum()] = np.repeat((num_patches > 0) & (num_patches < lengths), lengths)
    chosen = {
        "separate": {"vision": is_patch, "language": ~is_patch},
        "joint": {"vision": is_patch & ~is_joint, "language": ~is_patch & ~is_joint, "joint": is_joint},
    }
    return {
        kind: {name: _tensor(np.flatnonzero(which)) for name, which in routes.items()}
        for kind, routes in chosen.items()
    }


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All of starts[i], starts[i] + 1, ... starts[i] + lengths[i] - 1, end to end, int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


def _concatenated(parts: list[np.ndarray], empty_shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(empty_shape, np.int64)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
