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
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn

from metalm.config import DecoderConfig
from metalm.kernels import (
    ActivationKind,
    HiddenPattern,
    IntervalMask,
    NormKind,
    activate,
    interval_attention,
    residual_norm,
    residual_sum,
    turn,
)
from metalm.model.activations import ACTIVATIONS
from metalm.model.decoder_cache import DecoderCache
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
    cache: DecoderCache | None = None
    """Of rows that are continued; the mask is then that of what `DecoderCache.extend` gives."""


class IntervalCoreAttention(nn.Module):
    """Megatron's `core_attention`, by the interval kernel."""

    def __init__(self, config: TransformerConfig, layer_number: int, **unused: Any) -> None:
        super().__init__()
        self.layer = layer_number - 1
        self.site = SITES_PER_LAYER * self.layer

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
        dropout, cache = attention_mask.dropout, attention_mask.cache
        dropped = {} if dropout is None else dropout.of_attention(self.site)
        if cache is not None:
            query, key, value = cache.extend(self.layer, query, key, value)
        attended = interval_attention(query, key, value, attention_mask.mask, **dropped)
        attended = attended.transpose(1, 2).flatten(0, 1)[:, None]
        return (attended if group is None else to_positions(attended, group)).flatten(2)


class DecoderAttention(SelfAttention):
    """Megatron's self-attention, without what serves inference."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Visibility, rotation: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, D] to the same, and a bias that is not added; the rotation is `turn`'s, of S * B vectors."""
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if rotation is not None:
            query, key = (turn(part.flatten(0, 1), rotation).view(part.shape) for part in (query, key))
        found: tuple[Tensor, Tensor | None] = self.linear_proj(
            self.core_attention(query, key, value, attention_mask)
        )
        return found


class _Norm(nn.Module):
    """Layer norm or RMS norm, built as Megatron builds norms; its own has no sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.kind: NormKind = "layer_norm" if config.normalization == "LayerNorm" else "rms_norm"
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size)) if self.kind == "layer_norm" else None
        self.split = config.sequence_parallel
        self.again: Recompute | None = None

    def _alone(self, hidden: Tensor) -> Tensor:
        if self.again is not None:
            return self.again.run(self._normalise, hidden, *self._whole_parameters())
        return self._normalise(hidden, *self._whole_parameters())

    def _normalise(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return residual_norm(None, hidden, weight, bias, kind=self.kind, eps=self.eps).normed

    def _whole_parameters(self) -> list[Tensor]:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return [sum_gradient(parameter) for parameter in parameters] if self.split else [*parameters]


class DecoderNorm(_Norm):
    """The norm of the last layer's output."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self._alone(hidden)


class ResidualNorm(_Norm):
    """The norm of the residual stream, with what a sublayer adds to the stream."""

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None = None,
        branch_bias: Tensor | None = None,
        *,
        residual_scale: float = 1.0,
        dropout: HiddenPattern | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[..., D] each: the normed sum, itself again, and the sum; see `residual_norm`."""
        added: dict[str, Any] = {"residual_scale": residual_scale, "branch_bias": branch_bias}
        added |= {"dropout": dropout}
        if self.again is not None:
            total = residual_sum(branch, residual, **added)
            normed = self._alone(total)
            return normed, normed, total
        weight, *bias = self._whole_parameters()
        kind, eps = self.kind, self.eps
        found = residual_norm(branch, residual, weight, *bias, kind=kind, eps=eps, **added)
        return found.normed, found.again, found.total


class DecoderActivation(nn.Module):
    """Between a feed-forward's layers, where Megatron would put one of Transformer Engine's."""

    def __init__(self, config: TransformerConfig, kind: ActivationKind) -> None:
        super().__init__()
        self.kind, self.is_gated = kind, config.gated_linear_unit
        self.again: Recompute | None = None

    def forward(self, inner: Tensor, bias: Tensor | None) -> Tensor:
        """[S, B, F] to itself; [S, B, 2 F] to [S, B, F] where its first half is a gate."""
        inputs = [inner] if bias is None else [inner, bias]
        if self.again is not None:
            return self.again.run(self._activate, *inputs)
        return self._activate(*inputs)

    def _activate(self, inner: Tensor, bias: Tensor | None = None) -> Tensor:
        return activate(inner, self.kind, is_gated=self.is_gated, bias=bias)


class DecoderFeedForward(MLP):
    """Megatron's feed-forward, whose activation adds the first layer's bias."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, B, D] to the same, and a bias that is not added."""
        found: tuple[Tensor, Tensor | None] = self.linear_fc2(
            self.activation_func(*self.linear_fc1(hidden_states))
        )
        return found


class DeepNormLayer(MegatronModule, BaseTransformerLayer):
    """Post-LN layer with DeepNorm's residual weight."""

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
        self.first_site = SITES_PER_LAYER * (layer_number - 1)
        self.residual_scale = deepnorm_alpha(config.num_layers)
        self.self_attention = build_module(
            attention, config=config, layer_number=layer_number, pg_collection=groups
        )
        self.attention_norm = ResidualNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = build_module(mlp, config=config, tp_group=groups.tp)
        self.mlp_norm = ResidualNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(
        self, hidden_states: Tensor, attention_mask: Visibility, rotary_pos_emb: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, D] to [S, B, D], in the form of Megatron's own layer."""
        dropout, scale = attention_mask.dropout, self.residual_scale
        patterns = [None if dropout is None else dropout.at(self.first_site + site) for site in (1, 2)]
        branch = self.self_attention(hidden_states, attention_mask, rotary_pos_emb)
        hidden, again, _ = self.attention_norm(
            hidden_states, *branch, residual_scale=scale, dropout=patterns[0]
        )
        branch = self.mlp(hidden)
        return self.mlp_norm(again, *branch, residual_scale=scale, dropout=patterns[1])[0], None


class PreNormLayer(MegatronModule, BaseTransformerLayer):
    """Pre-LN layer, with the parameters' names of Megatron's own."""

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
        self.input_layernorm = ResidualNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = build_module(
            attention, config=config, layer_number=layer_number, pg_collection=groups
        )
        self.pre_mlp_layernorm = ResidualNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = build_module(mlp, config=config, tp_group=groups.tp)

    def forward(
        self, hidden_states: Tensor, attention_mask: Visibility, rotary_pos_emb: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, D] to [S, B, D], in the form of Megatron's own layer."""
        normed, _, hidden = self.input_layernorm(hidden_states)
        branch = self.self_attention(normed, attention_mask, rotary_pos_emb)
        normed, _, hidden = self.pre_mlp_layernorm(hidden, *branch)
        output, bias = self.mlp(normed)
        return residual_sum(output, hidden, branch_bias=bias), None


class ParallelLayer(PreNormLayer):
    """Pre-LN layer whose attention and feed-forward read the same residual stream (GPT-NeoX)."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Visibility, rotary_pos_emb: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[S, B, D] to [S, B, D], in the form of Megatron's own layer."""
        normed, _, hidden = self.input_layernorm(hidden_states)
        attended, bias = self.self_attention(normed, attention_mask, rotary_pos_emb)
        normed, _, hidden = self.pre_mlp_layernorm(hidden)
        hidden = residual_sum(attended, hidden, branch_bias=bias)
        output, bias = self.mlp(normed)
        return residual_sum(output, hidden, branch_bias=bias), None


def decoder_block_spec(config: DecoderConfig) -> TransformerBlockSubmodules:
    """The decoder's layers for Megatron's TransformerBlock; DeepNorm is post-LN and needs no final norm."""
    spec = get_gpt_layer_local_spec()
    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp
    attention.module, mlp.module = DecoderAttention, DecoderFeedForward
    attention.submodules.core_attention = IntervalCoreAttention
    attention.submodules.linear_qkv = mlp.submodules.linear_fc1 = DecoderColumnParallelLinear
    kind, _ = ACTIVATIONS[config.activation]
    mlp.submodules.activation_func = ModuleSpec(module=DecoderActivation, params={"kind": kind})
    attention.submodules.linear_proj = mlp.submodules.linear_fc2 = DecoderRowParallelLinear
    module, norm = (PreNormLayer, DecoderNorm) if config.normalization == "pre_ln" else (DeepNormLayer, None)
    if config.parallel_residual:
        module = ParallelLayer
    layer = ModuleSpec(module=module, params={"attention": attention, "mlp": mlp})
    return TransformerBlockSubmodules([layer] * config.num_layers, norm)
