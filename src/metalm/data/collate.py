"""Rows to a SemiCausalBatch: all indices that the model needs, computed for the whole micro-batch at once.

Which positions are trained is not decided here: rows carry the weights of their losses.

Shape letters as in `metalm.batch`; K spans, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metalm.batch import EncoderBatch, EncoderShare, SemiCausalBatch
from metalm.config.model_schema import EncoderConfig, ModelConfig
from metalm.data.balance import assign_spans, span_costs
from metalm.data.row import NO_TOKEN, Row, RowSpans
from metalm.kernels import IntervalMask, Segments, find_segments
from metalm.modalities import modality_of_encoder
from metalm.share_lengths import padded_length, share_length

ROUTE_STEPS = 16
"""Lengths of routes from one power of two to the next: see `padded_length`."""
DROPOUT_MULTIPLE = 4
"""Spans begin at a multiple of this many elements where the encoder has dropout."""


def collate(
    rows: Sequence[Row],
    *,
    model_config: ModelConfig,
    sequence_length: int,
    tp_size: int,
    pad_id: int,
    cp_size: int = 1,
) -> SemiCausalBatch:
    """Makes one micro-batch of rows.

    Position p predicts the token at p + 1, or the row's target, with the row's loss weight there; padding has
    weight 0.

    Args:
        rows: at most `sequence_length` tokens each.
        tp_size: tensor-parallel ranks that work on the rows.
        pad_id: stands where there is no token.
        cp_size: context-parallel ranks that do. The spans of each encoder are split into a share for each of
            the ranks of both; the positions of all rows, end to end, into an equal run for each of these.
    """
    num_rows, length = len(rows), sequence_length
    # One column more holds the token that follows a full row.
    stream = np.full((num_rows, length + 1), pad_id, np.int64)
    for b, row in enumerate(rows):
        stream[b, : len(row.tokens)] = row.tokens
        if row.next_token != NO_TOKEN:
            stream[b, len(row.tokens)] = row.next_token
    tokens, labels = stream[:, :-1].copy(), stream[:, 1:].copy()
    for b, row in enumerate(rows):
        if row.targets is not None:
            own = labels[b, : len(row.targets)]
            own[row.targets != NO_TOKEN] = row.targets[row.targets != NO_TOKEN]

    start, lengths = _document_intervals(rows, length)
    attention_start = np.repeat(start, lengths).reshape(num_rows, length)
    index = np.arange(length, dtype=np.int32)
    num_tokens = np.array([len(row.tokens) for row in rows])[:, None]
    real = index < num_tokens
    attention_end = np.where(real, index + 1, 0).astype(np.int32)
    positions = np.where(real, index - attention_start, 0).astype(np.int64)

    loss_weights = np.zeros((num_rows, length), np.float32)
    for b, row in enumerate(rows):
        loss_weights[b, : len(row.tokens)] = row.loss_weights
    spans = {name: _RowsSpans(rows, name, length) for name in model_config.encoders}
    for span in spans.values():
        if model_config.decoder.spans == "bidirectional":
            ends = span.bounds[:, 1] - span.bounds[:, 0] // length * length
            attention_end.reshape(-1)[span.positions] = np.repeat(ends, span.lengths)
    labels[loss_weights == 0] = pad_id

    encoders = {
        name: _encoder_batch(
            span, tokens.reshape(-1), model_config.encoders[name], tp_size * cp_size, cp_size, pad_id
        )
        for name, span in spans.items()
    }
    for span in spans.values():
        tokens.reshape(-1)[span.positions] = pad_id
    segments = find_segments(attention_start, attention_end)
    mask = IntervalMask.joined(torch.from_numpy(attention_start), torch.from_numpy(attention_end), None)
    return SemiCausalBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(loss_weights),
        positions=torch.from_numpy(positions),
        attention_start=torch.from_numpy(attention_start),
        attention_end=torch.from_numpy(attention_end),
        source_ids=torch.tensor([row.source_id for row in rows]),
        dropout_seeds=torch.tensor([row.dropout_seed for row in rows], dtype=torch.int64),
        encoders=encoders,
        mask_views=mask.views(),
        **_segment_fields(segments if segments is not None and segments.is_causal else None),
    )


def _segment_fields(segments: Segments | None) -> dict[str, Any]:
    """Of a batch or share."""
    if segments is None:
        return {}
    return {
        "segment_bounds": segments.bounds,
        "longest_segment": segments.longest,
        "has_padding": segments.has_padding,
    }


class _RowsSpans:
    """The spans of one encoder in all rows, in flat positions row * S + p."""

    def __init__(self, rows: Sequence[Row], encoder: str, length: int) -> None:
        found: list[tuple[int, RowSpans]] = [
            (b, row.spans[encoder]) for b, row in enumerate(rows) if encoder in row.spans
        ]
        self.bounds = _concatenated([spans.bounds + b * length for b, spans in found], (0, 2))
        self.num_patches = _concatenated([spans.num_patches for _, spans in found], (0,))
        self.media = [spans.media for _, spans in found if spans.media is not None]
        self.lengths = self.bounds[:, 1] - self.bounds[:, 0]
        self.seeds = _concatenated(
            [span_seeds(rows[b].dropout_seed, spans.bounds[:, 0]) for b, spans in found], (0,)
        )
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


def span_seeds(row_seed: int, starts: np.ndarray) -> np.ndarray:
    """Seeds [K] int64 of a row's spans, which begin at `starts` [K]: the row's, mixed with the place.

    The mixing is that of splitmix64 (Steele et al., 2014).
    """
    mixed = np.uint64(row_seed) + (starts.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).view(np.int64)


def _encoder_batch(
    spans: _RowsSpans, tokens: np.ndarray, config: EncoderConfig, num_shares: int, cp_size: int, pad_id: int
) -> EncoderBatch:
    owners = assign_spans(span_costs(spans.lengths, config), num_shares)
    members = [np.flatnonzero(owners == rank) for rank in range(num_shares)]
    multiple = DROPOUT_MULTIPLE if config.dropout else 1
    taken = -(-spans.lengths // multiple) * multiple
    routed = config.joint_layers is not None
    totals = [int(taken[chosen].sum()) for chosen in members]
    if routed:
        routes = [_RouteLengths(spans.lengths[chosen], spans.num_patches[chosen]) for chosen in members]
        totals = [total + route.padding for total, route in zip(totals, routes, strict=True)]
    length = share_length(max(totals))
    modality = modality_of_encoder(config)
    media = np.concatenate(spans.media) if spans.media else modality.no_media(config)
    rows_of_media = modality.rows_of_media(spans.num_patches)
    first_rows = np.cumsum(rows_of_media) - rows_of_media
    shares, vectors, positions = [], [], []
    first_elements = np.cumsum(spans.lengths) - spans.lengths
    if config.pretrained is not None:
        pad_id = 0  # the shared tokenizer's may be beyond the encoder's vocabulary
    for rank, chosen in enumerate(members):
        layout = _ShareLayout(spans, chosen, taken[chosen], length)
        docked = _ranges(spans.bounds[chosen, 0], spans.lengths[chosen])
        span_tokens = tokens[docked]
        if spans.ids is not None:
            span_tokens = spans.ids[_ranges(first_elements[chosen], spans.lengths[chosen])]
        vectors.append(rank * length + layout.elements)
        positions.append(docked)
        own_media = media[_ranges(first_rows[chosen], rows_of_media[chosen])]
        shares.append(_share(spans, chosen, layout, span_tokens, own_media, pad_id, routed))
    dock_vectors, dock_positions = np.concatenate(vectors), np.concatenate(positions)
    holders = dock_positions // (len(tokens) // cp_size)
    order = np.argsort(holders, kind="stable")
    return EncoderBatch(
        shares=tuple(shares),
        dock_vectors=torch.from_numpy(dock_vectors[order]),
        dock_positions=torch.from_numpy(dock_positions[order]),
        dock_bounds=tuple(np.searchsorted(holders[order], range(cp_size + 1)).tolist()),
    )


class _ShareLayout:
    """Where the elements of chosen spans [k] stand among the `length` of a share."""

    def __init__(self, spans: _RowsSpans, chosen: np.ndarray, taken: np.ndarray, length: int) -> None:
        self.length = length
        self.lengths, self.num_patches = spans.lengths[chosen], spans.num_patches[chosen]
        self.starts = np.cumsum(taken) - taken
        self.end = int(taken.sum())
        self.elements = _ranges(self.starts, self.lengths)
        self.patches = _ranges(self.starts, self.num_patches)

    def spread(self, values: np.ndarray, dtype: type) -> np.ndarray:
        """One value per span [k] at all of its elements, and 0 elsewhere, [length]."""
        whole: np.ndarray = np.zeros(self.length, dtype)
        whole[self.elements] = np.repeat(values, self.lengths)
        return whole


def _share(
    spans: _RowsSpans,
    chosen: np.ndarray,
    layout: _ShareLayout,
    span_tokens: np.ndarray,
    media: np.ndarray,
    pad_id: int,
    routed: bool,
) -> EncoderShare:
    """The elements of the chosen spans [k], end to end, and padded."""
    num_patches, slots = layout.num_patches, layout.patches
    index = _ranges(np.zeros_like(layout.lengths), layout.lengths)
    token_ids = np.full(layout.length, pad_id, np.int64)
    positions, span_positions = np.zeros(layout.length, np.int64), np.zeros(layout.length, np.int32)
    token_ids[layout.elements], span_positions[layout.elements] = span_tokens, index
    positions[layout.elements] = index - np.repeat(num_patches, layout.lengths)
    token_ids[slots] = pad_id
    positions[slots] = _ranges(np.zeros_like(num_patches), num_patches)
    attention_end = layout.spread(layout.starts + layout.lengths, np.int32)
    if not len(chosen):
        attention_end[0] = 1  # the dummy element sees itself
    attention_start = layout.spread(layout.starts, np.int32)
    segments = find_segments(attention_start[None], attention_end[None])
    start, end = (torch.from_numpy(bound)[None] for bound in (attention_start, attention_end))
    return EncoderShare(
        token_ids=_tensor(token_ids),
        positions=_tensor(positions),
        attention_start=_tensor(attention_start),
        attention_end=_tensor(attention_end),
        media=_tensor(media),
        patch_slots=_tensor(slots),
        dropout_seeds=_tensor(layout.spread(spans.seeds[chosen], np.int64)),
        dropout_positions=_tensor(span_positions),
        routes=_routes(layout) if routed else {},
        mask_views=IntervalMask(start, end, layout.length).views(),
        **_segment_fields(segments),
    )


class _RouteLengths:
    """How long the routes of a share's chosen spans [k] are, and padded."""

    def __init__(self, lengths: np.ndarray, num_patches: np.ndarray) -> None:
        mixed = (num_patches > 0) & (num_patches < lengths)
        self.patches, self.lone_patches = int(num_patches.sum()), int(num_patches[~mixed].sum())
        self.joint = int(lengths[mixed].sum())

    @property
    def padding(self) -> int:
        """Elements of padding that they take together, in the partition that takes more."""
        return max(
            _route_padding(self.patches), _route_padding(self.lone_patches) + _route_padding(self.joint)
        )


def _route_padding(length: int) -> int:
    return padded_length(length, ROUTE_STEPS) - length


def _routes(layout: _ShareLayout) -> dict[str, dict[str, Tensor]]:
    """Which elements go through which feed-forward: see `EncoderShare.routes`.

    What pads a route is taken from the padding at the share's end; the rest of that is language.
    """
    lengths = _RouteLengths(layout.lengths, layout.num_patches)
    is_patch = np.zeros(layout.length, bool)
    is_patch[layout.patches] = True
    mixed = (layout.num_patches > 0) & (layout.num_patches < layout.lengths)
    is_joint = layout.spread(mixed, bool)
    lone_end = layout.end + _route_padding(lengths.lone_patches)
    joint_end = lone_end + _route_padding(lengths.joint)
    lone = is_patch & ~is_joint
    lone[layout.end : lone_end] = True
    is_joint[lone_end:joint_end] = True
    is_patch[layout.end : layout.end + _route_padding(lengths.patches)] = True
    chosen = {
        "separate": {"vision": is_patch, "language": ~is_patch},
        "joint": {"vision": lone, "language": ~lone & ~is_joint, "joint": is_joint},
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
