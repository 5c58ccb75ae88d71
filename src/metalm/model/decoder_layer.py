"""The decoder's Megatron parts that are ours: attention by intervals, norms, and the DeepNorm layer.

Under sequence parallelism each tensor-parallel rank holds some positions of the residual stream. What
stands there with a whole parameter (norms, biases of the row-parallel layers) gets a partial gradient on
each rank; it is summed over the ranks where the parameter is used, so that every gradient which reaches
the engine is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, TransformerLayer
from torch import Tensor, nn
from torch.nn import functional

from metalm.config import DecoderConfig
from metalm.kernels import IntervalMask, interval_attention
from metalm.model.decoder_linear import DecoderColumnParallelLinear, DecoderRowParallelLinear, sum_gradient
from metalm.model.deepnorm import deepnorm_alpha
from metalm.model.hidden_dropout import SITES_PER_LAYER, RowDropout
from metalm.model.recompute import Recompute
from metalm.model.ulysses import to_heads, to_positions


@dataclass(frozen=True, eq=False)
class Visibility:
    """What Megatron hands to every layer as the attention mask."""

    mask: IntervalMask
    """Of all positions of the rows."""
    dropout: RowDropout | None
    context_group: dist.ProcessGroup | None
    """Of the ranks that hold the other positions; None: this rank holds all."""


class IntervalCoreAttention(nn.Module):
    """Megatron's `core_attention`, by the interval kernel."""

    def __init__(self, config: TransformerConfig, layer_number: int, **unused: Any) -> None:
        super().__init__()
        self.site = SITES_PER_LAYER * (layer_number - 1)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Visibility, **unused: Any
    ) -> Tensor:
        """[S / C, B, H, K], keys and values [S / C, B, Hkv, K], to [S / C, B, H * K].

        Collective: the context group.
        """
        group = attention_mask.context_group
        if group is not None:
            query, key, value = to_heads(query, key, value, group)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        dropout = attention_mask.dropout
        dropped = {} if dropout is None else dropout.of_attention(self.site)
        attended = interval_attention(query, key, value, attention_mask.mask, **dropped).permute(2, 0, 1, 3)
        return (attended if group is None else to_positions(attended, group)).flatten(2)


class DecoderNorm(nn.Module):
    """Layer norm or RMS norm, built as Megatron builds norms; its own has no sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size)) if config.normalization == "LayerNorm" else None
        self.split = config.sequence_parallel
        self.again: Recompute | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        parameters = [self._whole(self.weight)]
        if self.bias is not None:
            parameters.append(self._whole(self.bias))
        if self.again is not None:
            return self.again.run(self._normalise, hidden, *parameters)
        return self._normalise(hidden, *parameters)

    def _normalise(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return functional.rms_norm(hidden, weight.shape, weight, self.eps)
        return functional.layer_norm(hidden, weight.shape, weight, bias, self.eps)

    def _whole(self, parameter: Tensor) -> Tensor:
        return sum_gradient(parameter) if self.split else parameter


class DecoderActivation(nn.Module):
    """Between a feed-forward's layers, where Megatron would put one of Transformer Engine's."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activate, self.is_gated = config.activation_func, config.gated_linear_unit
        self.again: Recompute | None = None

    def forward(self, inner: Tensor) -> Tensor:
        """[S, B, F] to itself; [S, B, 2 F] to [S, B, F] where its first half is a gate."""
        if self.again is not None:
            return self.again.run(self._activate, inner)
        return self._activate(inner)

    def _activate(self, inner: Tensor) -> Tensor:
        if not self.is_gated:
            return self.activate(inner)
        gate, value = inner.chunk(2, dim=-1)
        return self.activate(gate) * value


class DeepNormLayer(MegatronModule, BaseTransformerLayer):
    """Post-LN layer with DeepNorm's residual weight, of Megatron's attention and feed-forward.

    Megatron's own layer is pre-LN, and its residual has no weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        attention: ModuleSpec,
        mlp: ModuleSpec,
        layer_number: int = 1,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        groups = unused["pg_collection"]
        self.layer_number = layer_number
        self.residual_scale = deepnorm_alpha(config.num_layers)
        self.self_attention = build_module(
            attention, config=config, layer_number=layer_number, pg_collection=groups
        )
        self.attention_norm = DecoderNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = build_module(mlp, config=config, tp_group=groups.tp)
        self.mlp_norm = DecoderNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(
        self, hidden_states: Tensor, attention_mask: Visibility, rotary_pos_emb: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, D] to [S, B, D], in the form of Megatron's own layer."""
        attended = _with_bias(
            *self.self_attention(hidden_states, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
        )
        dropout, site = attention_mask.dropout, SITES_PER_LAYER * (self.layer_number - 1)
        if dropout is not None:
            attended = dropout.drop(attended, site + 1)
        hidden = self.attention_norm(torch.add(attended, hidden_states, alpha=self.residual_scale))
        output = _with_bias(*self.mlp(hidden))
        if dropout is not None:
            output = dropout.drop(output, site + 2)
        return self.mlp_norm(torch.add(output, hidden, alpha=self.residual_scale)), None


class ParallelLayer(TransformerLayer):
    """Megatron's pre-LN layer, whose attention and feed-forward read the same residual stream (GPT-NeoX)."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Visibility, rotary_pos_emb: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, D] to [S, B, D], in the form of Megatron's own layer."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(normed, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
        output = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + _with_bias(*attended) + _with_bias(*output), None


def decoder_block_spec(config: DecoderConfig) -> TransformerBlockSubmodules:
    """The decoder's layers for Megatron's TransformerBlock; DeepNorm is post-LN and needs no final norm."""
    layer = get_gpt_layer_local_spec()
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    attention.submodules.core_attention = IntervalCoreAttention
    attention.submodules.linear_qkv = mlp.submodules.linear_fc1 = DecoderColumnParallelLinear
    mlp.submodules.activation_func = DecoderActivation
    attention.submodules.linear_proj = mlp.submodules.linear_fc2 = DecoderRowParallelLinear
    if config.normalization == "pre_ln":
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = DecoderNorm
        if config.parallel_residual:
            layer.module = ParallelLayer
        return TransformerBlockSubmodules([layer] * config.num_layers, DecoderNorm)
    deepnorm = ModuleSpec(module=DeepNormLayer, params={"attention": attention, "mlp": mlp})
    return TransformerBlockSubmodules([deepnorm] * config.num_layers, None)


def _with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias
