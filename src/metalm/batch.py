"""SemiCausalBatch: the one contract between data and model.

Every index that the step needs (positions, intervals, dock indices, the shares of the ranks) is
computed in the collator, on the CPU, so that the step itself never waits for the device.

Shape letters: B rows, S decoder positions, R ranks that work on the same rows (T tensor-parallel x C
context-parallel ones), L encoder elements of one share, P patches of one share (of images, or vectors of
clips), N docked vectors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderShare:
    """The spans of one micro-batch that one rank encodes with one encoder, packed end to end.

    A span is a run of elements: first the patches of its image or clip, if any, then its text tokens. In
    an encoder with dropout every span begins at a multiple of 4, because its attention draws four words
    at once; what pads a span to that sees nothing.
    A rank without a span holds one dummy element whose vector is docked nowhere; the padding up to
    L sees nothing.
    """

    token_ids: Tensor  # [L] int64; the padding id where a patch stands and in the padding
    positions: Tensor  # [L] int64; index in the span's text, or of the patch in its image or clip
    attention_start: Tensor  # [L] int32; first element of the span
    attention_end: Tensor  # [L] int32; end of the span, exclusive
    media: Tensor
    """Of images uint8 [P, patch_size * patch_size * 3]; of audio float32, a row of features for each clip."""
    patch_slots: Tensor  # [P] int64, P may be 0; which of the L elements each patch is
    dropout_seeds: Tensor  # [L] int64; of the span
    dropout_positions: Tensor  # [L] int32; index in the span
    routes: dict[str, dict[str, Tensor]]
    """For an encoder with `joint_layers`, int64 slots of the elements of each of its feed-forwards, all L of
    them in each of two partitions: `separate` into `vision` (patches) and `language` (text); `joint` into the
    same two, of spans of one modality alone, and `joint`, spans of an image with text. Padding brings each to
    one of few lengths."""
    segment_bounds: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """[N + 1] int32; where spans and padding begin, and L. Empty where nobody has looked for them."""
    longest_segment: int = 0
    has_padding: bool = False
    mask_views: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """[4, L] int32; see `IntervalMask.views`. Empty where nobody has made them."""


@dataclass(frozen=True)
class EncoderBatch:
    """The spans of one micro-batch that go through one encoder, split over the ranks with the same rows.

    The shares have one common length L, so the vectors of all ranks gather to [R * L, hidden].
    """

    shares: tuple[EncoderShare, ...]  # one per rank
    dock_vectors: Tensor  # [N] int64; index into the gathered [R * L]
    dock_positions: Tensor  # [N] int64; row * S + decoder position
    dock_bounds: tuple[int, ...]
    """[C + 1], from 0 to N; which of the N stand in each context rank's run of the B * S positions."""


@dataclass(frozen=True)
class SemiCausalBatch:
    """One micro-batch of packed rows, whole on every rank that works on it.

    Position p predicts `labels[p]`, and its loss counts `loss_weights[p]` times. Positions inside a span
    before its last one, last positions of documents and padding have weight 0.
    """

    tokens: Tensor  # [B, S] int64; the padding id at docked positions
    labels: Tensor  # [B, S] int64; the padding id where the weight is 0
    loss_weights: Tensor  # [B, S] float32
    positions: Tensor  # [B, S] int64; restart at each document
    attention_start: Tensor  # [B, S] int32; first visible key
    attention_end: Tensor  # [B, S] int32; end of the visible keys, exclusive
    source_ids: Tensor  # [B] int64; index of the row's source in the order of the config
    dropout_seeds: Tensor  # [B] int64; of the row, wherever and whenever it is trained on
    encoders: dict[str, EncoderBatch]  # one entry per encoder of the model, in the order of the config
    masked_positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[M] int64; row * S + position of what replaced-token detection masks: the trained positions, each of
    which then predicts its own token. M is 0 with the semi-causal objective."""
    replacement_draws: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """[M] float64 in [0, 1); where in the decoder's cumulated probabilities the replacement is taken."""
    segment_bounds: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """[N + 1] int32; where documents and padding begin in the rows laid end to end, and B * S. Empty where
    positions see more than their document up to themselves."""
    longest_segment: int = 0
    has_padding: bool = False
    mask_views: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """[4, B * S] int32; see `IntervalMask.views`, of the rows laid end to end. Empty where nobody has made
    them."""

    def to(self, device: torch.device) -> SemiCausalBatch:
        """The same batch with every tensor on `device`."""
        return _map_leaves(self, Tensor, lambda tensor: tensor.to(device))

    def of_rank(self, rows_rank: int) -> SemiCausalBatch:
        """Without what only other ranks with the same rows need: all of their shares but the tokens."""

        def part(encoder: EncoderBatch) -> EncoderBatch:
            shares = (
                share if rank == rows_rank else _tokens_alone(share)
                for rank, share in enumerate(encoder.shares)
            )
            return dataclasses.replace(encoder, shares=tuple(shares))

        if all(len(encoder.shares) == 1 for encoder in self.encoders.values()):
            return self
        encoders = {name: part(encoder) for name, encoder in self.encoders.items()}
        return dataclasses.replace(self, encoders=encoders)


def _tokens_alone(share: EncoderShare) -> EncoderShare:
    emptied = _map_leaves(share, Tensor, lambda tensor: tensor[:0])
    return dataclasses.replace(emptied, token_ids=share.token_ids)


_ALIGNMENT = 128
"""Bytes: tensors in one piece of memory begin at multiples, as kernels like to read them."""


@dataclass(frozen=True)
class TensorSpec:
    """Stands for a tensor whose content is a part of one piece of memory."""

    shape: torch.Size
    dtype: torch.dtype
    offset: int
    """Bytes, in the piece."""

    @property
    def end(self) -> int:
        """Where the tensor's content ends."""
        return self.offset + self.shape.numel() * self.dtype.itemsize

    def view_in(self, content: Tensor) -> Tensor:
        """The tensor, in the piece `content` of uint8."""
        return content[self.offset : self.end].view(self.dtype).view(self.shape)


def to_bytes(value: Any, *, pinned: bool = False) -> tuple[Any, Tensor]:
    """Take the CPU tensors out of (nested) batches: the structure with specs in their place, and one
    uint8 vector of all contents, in page-locked memory if asked."""
    end = 0

    def place(tensor: Tensor) -> TensorSpec:
        nonlocal end
        spec = TensorSpec(tensor.shape, tensor.dtype, -(-end // _ALIGNMENT) * _ALIGNMENT)
        end = spec.end
        return spec

    structure = _map_leaves(value, Tensor, place)
    content = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for spec, tensor in zip(_leaves(structure, TensorSpec), _leaves(value, Tensor), strict=True):
        spec.view_in(content).copy_(tensor)
    return structure, content


def count_bytes(structure: Any) -> int:
    """Length of the uint8 vector that belongs to a structure of `to_bytes`."""
    return max((spec.end for spec in _leaves(structure, TensorSpec)), default=0)


def from_bytes(structure: Any, content: Tensor) -> Any:
    """Put back what `to_bytes` took out, as views of `content`, on any device."""
    return _map_leaves(structure, TensorSpec, lambda spec: spec.view_in(content))


def in_one_piece(batch: SemiCausalBatch, *, pinned: bool) -> SemiCausalBatch:
    """The same micro-batch with its tensors in one piece of host memory, page-locked if asked."""
    moved: SemiCausalBatch = from_bytes(*to_bytes(batch, pinned=pinned))
    return moved


def piece_of(batch: SemiCausalBatch) -> Tensor | None:
    """The piece of memory that the tensors of `in_one_piece` are in, as uint8; None if they are not."""
    storages = [tensor.untyped_storage() for tensor in _leaves(batch, Tensor)]
    if len({storage.data_ptr() for storage in storages}) > 1:
        return None
    return torch.empty(0, dtype=torch.uint8, device=batch.tokens.device).set_(storages[0])


def views_in(batch: SemiCausalBatch, content: Tensor) -> SemiCausalBatch:
    """A batch that is in one piece, as views of a copy of that piece, on any device."""

    def view(tensor: Tensor) -> Tensor:
        offset = int(tensor.storage_offset()) * tensor.dtype.itemsize
        return TensorSpec(tensor.shape, tensor.dtype, offset).view_in(content)

    viewed: SemiCausalBatch = _map_leaves(batch, Tensor, view)
    return viewed


def _leaves(value: Any, leaf: type) -> list[Any]:
    found: list[Any] = []
    _map_leaves(value, leaf, found.append)
    return found


def _map_leaves(value: Any, leaf: type, change: Any) -> Any:
    if isinstance(value, leaf):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_leaves(item, leaf, change) for item in value)
    if isinstance(value, int):
        return value
    if isinstance(value, dict):
        return {key: _map_leaves(item, leaf, change) for key, item in value.items()}
    fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    return type(value)(**{name: _map_leaves(item, leaf, change) for name, item in fields.items()})
