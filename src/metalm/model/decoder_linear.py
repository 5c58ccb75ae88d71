"""The decoder's linear layers: Megatron's, and adapters beside them, cut like the weights they stand beside.

The same low-rank factors give the same result on any tensor-parallel size: of a column-parallel layer B is
split as the weight's rows are, of a row-parallel one A as its columns are; the other factor is whole on every
rank, and so is its gradient. What crosses between the ranks is as wide as the rank of the factors.
"""

from __future__ import annotations

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional

from metalm.config import DecoderConfig
from metalm.kernels.elementwise import choose_backend
from metalm.model.adapters import KeyValueScale, decoder_key_values

Linearised = tuple[Tensor, Tensor | None]
"""A product, and the bias if it is not added."""

TARGET_OF = {
    "linear_qkv": "query_key_value",
    "linear_proj": "attention_output",
    "linear_fc1": "feed_forward_in",
    "linear_fc2": "feed_forward_out",
}
"""What adapters call the layers, by module."""


class DecoderColumnParallelLinear(ColumnParallelLinear):
    """Megatron's column-parallel layer; on one tensor-parallel rank a plain product."""

    lora_scale: float | None = None
    key_values: KeyValueScale | None = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> Linearised:
        """[S, B, in] to [S, B, out / tp], and the bias if it is not added."""
        if self.tp_group.size() > 1:
            output, bias = super().forward(input_, weight, runtime_gather_output)
        else:
            output, bias = _linear(self, input_)
        if self.lora_scale is not None:
            output = output + self.lora_scale * functional.linear(self._low(input_), self.lora_b)
        if self.key_values is not None:
            output = output * self.key_values.rows(self.ia3)
        return output, bias

    def _low(self, input_: Tensor) -> Tensor:
        """[S, B, rank], whole on every rank; its gradient is summed over the ranks, which hold rows of B."""
        if self.sequence_parallel:
            low = functional.linear(input_, sum_gradient(self.lora_a))
            return gather_from_sequence_parallel_region(low, group=self.tp_group)
        low = functional.linear(input_, self.lora_a)
        return low if self.tp_group.size() == 1 else copy_to_tensor_model_parallel_region(low, self.tp_group)


class DecoderRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel layer, whose bias has a whole gradient under sequence parallelism, too."""

    lora_scale: float | None = None
    is_input_scaled = False

    def forward(self, input_: Tensor) -> Linearised:
        """[S, B, in / tp] to [S, B, out], or this rank's [S / tp, B, out], and a bias that is not added."""
        if self.is_input_scaled:
            input_ = input_ * self.ia3
        output, bias = self._multiply(input_)
        if self.lora_scale is not None:
            output = output + self.lora_scale * self._low_rank(input_)
        return output, bias

    def _multiply(self, input_: Tensor) -> Linearised:
        if self.tp_group.size() == 1:
            return _linear(self, input_)
        output, bias = super().forward(input_)
        if self.sequence_parallel and bias is not None:
            bias = sum_gradient(bias)
        return output, bias

    def _low_rank(self, input_: Tensor) -> Tensor:
        """B A x, where the ranks hold columns of A."""
        low = functional.linear(input_, self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
            return functional.linear(low, sum_gradient(self.lora_b))
        if self.tp_group.size() > 1:
            low = reduce_from_tensor_model_parallel_region(low, self.tp_group)
        return functional.linear(low, self.lora_b)


def _linear(layer: DecoderColumnParallelLinear | DecoderRowParallelLinear, input_: Tensor) -> Linearised:
    """On one rank: the bias is left to what follows where that adds it on its way."""
    if layer.skip_bias_add and choose_backend(input_) == "triton":
        return functional.linear(input_, layer.weight), layer.bias
    return functional.linear(input_, layer.weight, layer.bias), None


def adapt_decoder(decoder: nn.Module, config: DecoderConfig, tensor_size: int) -> None:
    """Give the layers that the adapter names its parameters, marked as Megatron marks its own."""
    adapter = config.adapter
    assert adapter is not None
    for name, layer in decoder.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if TARGET_OF.get(leaf) not in adapter.own_targets:
            continue
        is_column = isinstance(layer, DecoderColumnParallelLinear)
        assert is_column or isinstance(layer, DecoderRowParallelLinear)
        if adapter.kind == "lora":
            rows, columns = layer.weight.shape
            layer.lora_scale = adapter.scale
            layer.lora_a = nn.Parameter(torch.empty(adapter.factor_rank, columns))
            layer.lora_b = nn.Parameter(torch.empty(rows, adapter.factor_rank))
            stride = 2 if leaf == "linear_fc1" and config.is_gated else 1
            split = (layer.lora_b, 0, stride) if is_column else (layer.lora_a, 1, 1)
            set_tensor_model_parallel_attributes(split[0], True, *split[1:])
            continue
        if isinstance(layer, DecoderColumnParallelLinear):
            layer.key_values = decoder_key_values(config, tensor_size)
            layer.ia3 = nn.Parameter(torch.empty(layer.key_values.size))
        else:
            layer.is_input_scaled = True
            layer.ia3 = nn.Parameter(torch.empty(layer.weight.shape[1]))
        set_tensor_model_parallel_attributes(layer.ia3, True, 0, 1)


def sum_gradient(parameter: Tensor) -> Tensor:
    """The parameter itself, its gradient summed over the TP group."""
    return copy_to_tensor_model_parallel_region(parameter, get_tensor_model_parallel_group())
