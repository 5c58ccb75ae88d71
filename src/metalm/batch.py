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
    them in each of two partitions: `separate` into `vision` (patches) and `language` (text, padding); `joint`
    into the same two, of spans of one modality alone, and `joint`, spans of an image with text."""
    segment_bounds: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """[N + 1] int32; where spans and padding begin, and L. Empty where nobody has looked for them."""
    longest_segment: int = 0
    has_padding: bool = False


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

    def to(self, device: torch.device, *, non_blocking: bool = False) -> SemiCausalBatch:
        """The same batch with every tensor on `device`."""
        return _map_leaves(self, Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SemiCausalBatch:
        """The same batch in page-locked host memory."""
        return _map_leaves(self, Tensor, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class TensorSpec:
    """Stands for a tensor where only its shape and dtype are sent."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's content."""
        return self.shape.numel() * self.dtype.itemsize


def to_bytes(value: Any) -> tuple[Any, Tensor]:
    """Take the CPU tensors out of (nested) batches: the structure with specs in their place, and one
    uint8 vector of all contents."""
    contents: list[Tensor] = [torch.empty(0, dtype=torch.uint8)]

    def take(tensor: Tensor) -> TensorSpec:
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        contents.append(flat.view(torch.uint8))
        return TensorSpec(tensor.shape, tensor.dtype)

    structure = _map_leaves(value, Tensor, take)
    return structure, torch.cat(contents)


def count_bytes(structure: Any) -> int:
    """Length of the uint8 vector that belongs to a structure of `to_bytes`."""
    sizes: list[int] = []
    _map_leaves(structure, TensorSpec, lambda spec: sizes.append(spec.num_bytes))
    return sum(sizes)


def from_bytes(structure: Any, content: Tensor) -> Any:
    """Put back what `to_bytes` took out. The tensors own their memory."""
    offset = 0

    def put(spec: TensorSpec) -> Tensor:
        nonlocal offset
        piece = content[offset : offset + spec.num_bytes].clone()
        offset += spec.num_bytes
        return piece.view(spec.dtype).reshape(spec.shape)

    return _map_leaves(structure, TensorSpec, put)


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
