"""What layers are given beside the hidden vectors, taken apart into tensors and put together again.

A CUDA graph reads where it read when it was recorded: whatever varies from one micro-batch to the next is
copied there first, and so must be a list of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metalm.kernels import IntervalMask
from metalm.model.encoder_layer import Routes, Where
from metalm.model.hidden_dropout import SpanDropout

if TYPE_CHECKING:  # Megatron takes seconds
    from metalm.model.decoder_layer import Visibility

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a layer, after its hidden vectors: by place and by name."""


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Of one micro-batch, the same for all layers."""

    mask: IntervalMask
    varying: tuple[Tensor, ...]
    """Beside the mask; none of them needs a gradient."""
    arguments: Callable[[IntervalMask, Sequence[Tensor]], Arguments]
    """From a mask and such tensors, in other places, to what layers are called with."""

    @property
    def tensors(self) -> list[Tensor]:
        """All that varies between micro-batches of one form."""
        return [self.mask.start, self.mask.end, *self.varying]

    @property
    def run_length(self) -> int | None:
        """Where the mask is made of runs of one length."""
        mask, segments = self.mask, self.mask.segments
        if segments is None or not segments.is_uniform(mask.batch_size * mask.num_queries):
            return None
        return segments.longest

    def placed(self, tensors: Sequence[Tensor]) -> Arguments:
        """What layers are called with to read `tensors`. The mask is new: what is derived of it is, too."""
        start, end, *varying = tensors
        segments = self.mask.segments if self.run_length is not None else None
        return self.arguments(IntervalMask(start, end, self.mask.num_keys, segments), varying)


def decoder_inputs(seen: Visibility, rotary: Tensor | None) -> LayerInputs:
    """Of the decoder's layers; `rotary` is by what positions are turned."""
    dropped = seen.dropout
    varying = [] if rotary is None else [rotary]
    if dropped is not None:
        varying += [dropped.seeds, dropped.positions]

    def arguments(mask: IntervalMask, tensors: Sequence[Tensor]) -> Arguments:
        left = list(tensors)
        turned = None if rotary is None else left.pop(0)
        dropout = None if dropped is None else replace(dropped, seeds=left[0], positions=left[1])
        visible = replace(seen, mask=mask, dropout=dropout)
        return (), {"attention_mask": visible, "rotary_pos_emb": turned}

    return LayerInputs(seen.mask, tuple(varying), arguments)


def encoder_inputs(
    mask: IntervalMask, where: Where, routes: Routes, dropout: SpanDropout | None
) -> LayerInputs:
    """Of an encoder's layers, whose relative bias, if any, is not trained."""
    size = (mask.num_queries, mask.num_keys)
    slots = [(kind, name) for kind, chosen in routes.items() for name in chosen]
    varying = [routes[kind][name] for kind, name in slots]
    if where.bias is not None:
        varying.append(where.bias.by_distance(*size))
    if where.rotation is not None:
        varying.append(where.rotation)
    if dropout is not None:
        varying += [dropout.seeds, dropout.positions]

    def arguments(mask: IntervalMask, tensors: Sequence[Tensor]) -> Arguments:
        left = list(tensors)
        routed: Routes = {kind: {} for kind in routes}
        for kind, name in slots:
            routed[kind][name] = left.pop(0)
        bias = None if where.bias is None else where.bias.with_values(left.pop(0), *size)
        rotation = None if where.rotation is None else left.pop(0)
        dropped = None if dropout is None else SpanDropout(dropout.rate, *left)
        return (mask, Where(bias, rotation), routed, dropped), {}

    return LayerInputs(mask, tuple(varying), arguments)
