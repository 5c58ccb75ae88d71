"""The decoder's Megatron parts that are ours: core attention by intervals, and the DeepNorm layer."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn

from metalm.config import DecoderConfig
from metalm.kernels import IntervalMask, interval_attention
from metalm.model.deepnorm import deepnorm_alpha


class IntervalCoreAttention(nn.Module):
    """Megatron's `core_attention`, by the interval kernel. The attention mask is an IntervalMask."""

    def __init__(self, config: TransformerConfig, **unused: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: IntervalMask, **unused: Any
    ) -> Tensor:
        """[S, B, H, K] each to [S, B, H * K]."""
        length, rows, heads, width = query.shape
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        attended = interval_attention(query, key, value, attention_mask)
        return attended.permute(2, 0, 1, 3).reshape(length, rows, heads * width)


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
        self.attention_norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = build_module(mlp, config=config, tp_group=groups.tp)
        self.mlp_norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(
        self, hidden_states: Tensor, attention_mask: IntervalMask, **unused: Any
    ) -> tuple[Tensor, None]:
        """[S, B, D] to [S, B, D], in the form in which TransformerBlock calls a layer."""
        attended, bias = self.self_attention(hidden_states, attention_mask=attention_mask)
        hidden = self.attention_norm(self.residual_scale * hidden_states + attended + bias)
        output, bias = self.mlp(hidden)
        return self.mlp_norm(self.residual_scale * hidden + output + bias), None


def decoder_block_spec(config: DecoderConfig) -> TransformerBlockSubmodules:
    """The decoder's layers for Megatron's TransformerBlock; DeepNorm is post-LN and needs no final norm."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.self_attention.submodules.core_attention = IntervalCoreAttention
    if config.normalization == "pre_ln":
        return TransformerBlockSubmodules([layer] * config.num_layers, WrappedTorchNorm)
    parts = {"attention": layer.submodules.self_attention, "mlp": layer.submodules.mlp}
    deepnorm = ModuleSpec(module=DeepNormLayer, params=parts)
    return TransformerBlockSubmodules([deepnorm] * config.num_layers, None)
