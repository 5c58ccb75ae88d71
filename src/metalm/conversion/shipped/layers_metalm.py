"""Attention and transformer layer of MetaLM, the same for the decoder and the encoders.

Shape letters: B rows or spans, L positions, D hidden, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_metalm import MetaLMConfig


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by explicit probabilities, [B, H, L, K] each, with an additive mask [B, 1, L, keys].

    Returns:
        Output [B, L, H, K] and probabilities [B, H, L, keys].
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    attended = functional.dropout(probabilities, p=dropout, training=module.training) @ value
    return attended.transpose(1, 2).contiguous(), probabilities


class MetaLMLinear(nn.Linear):
    """A linear map that knows the gain of its initial weights."""

    init_gain = 1.0


class MetaLMAttention(nn.Module):
    """Multi-head attention, bidirectional."""

    is_causal = False

    def __init__(self, config: MetaLMConfig, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.head_size = hidden_size // num_heads
        self.q_proj = MetaLMLinear(hidden_size, hidden_size)
        self.k_proj = MetaLMLinear(hidden_size, hidden_size)
        self.v_proj = MetaLMLinear(hidden_size, hidden_size)
        self.o_proj = MetaLMLinear(hidden_size, hidden_size)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] to [B, L, D], and the probabilities where the implementation has them."""
        split = (*hidden.shape[:2], -1, self.head_size)
        query, key, value = (
            projection(hidden).view(split).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        key, value = self._remember(key, value, past_key_values)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        attended, probabilities = attend(
            self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=0.0, **kwargs
        )
        return self.o_proj(attended.reshape(hidden.shape)), probabilities

    def _remember(self, key: Tensor, value: Tensor, past_key_values: Cache | None) -> tuple[Tensor, Tensor]:
        return key, value


class MetaLMCausalAttention(MetaLMAttention):
    """Multi-head attention of the decoder: causal, with a cache of keys and values."""

    is_causal = True

    def __init__(self, config: MetaLMConfig, layer_idx: int) -> None:
        super().__init__(config, config.hidden_size, config.num_attention_heads)
        self.layer_idx = layer_idx

    def _remember(self, key: Tensor, value: Tensor, past_key_values: Cache | None) -> tuple[Tensor, Tensor]:
        if past_key_values is None:
            return key, value
        return past_key_values.update(key, value, self.layer_idx)


class MetaLMFeedForward(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = MetaLMLinear(hidden_size, intermediate_size)
        self.down_proj = MetaLMLinear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(functional.gelu(self.up_proj(hidden)))


class MetaLMLayer(GradientCheckpointingLayer):
    """Attention and feed-forward; post-LN with DeepNorm's residual weight (Wang et al., 2022), or pre-LN."""

    def __init__(
        self,
        attention: MetaLMAttention,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        normalization: str,
        eps: float,
    ) -> None:
        super().__init__()
        self.post_norm = normalization == "deepnorm"
        self.residual_scale = (2 * num_layers) ** 0.25 if self.post_norm else 1.0
        self.self_attn = attention
        self.attention_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.mlp = MetaLMFeedForward(hidden_size, intermediate_size)
        self.mlp_norm = nn.LayerNorm(hidden_size, eps=eps)
        # DeepNorm scales what passes values through; pre-LN what is added to the residual stream.
        scaled = [attention.o_proj, self.mlp.down_proj]
        scaled += [attention.v_proj, self.mlp.up_proj] if self.post_norm else []
        for part in scaled:
            part.init_gain = (8 * num_layers) ** -0.25 if self.post_norm else (2 * num_layers) ** -0.5

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        if self.post_norm:
            attended, _ = self.self_attn(hidden, attention_mask, past_key_values, **kwargs)
            hidden = self.attention_norm(self.residual_scale * hidden + attended)
            return self.mlp_norm(self.residual_scale * hidden + self.mlp(hidden))
        attended, _ = self.self_attn(self.attention_norm(hidden), attention_mask, past_key_values, **kwargs)
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden))


class MetaLMDecoderLayer(MetaLMLayer):
    """A layer of the decoder."""

    def __init__(self, config: MetaLMConfig, layer_idx: int) -> None:
        super().__init__(
            MetaLMCausalAttention(config, layer_idx),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            normalization=config.normalization,
            eps=config.layer_norm_eps,
        )


class MetaLMEncoderLayer(MetaLMLayer):
    """A layer of an encoder, whose sizes are `config.encoders[name]`."""

    def __init__(self, config: MetaLMConfig, name: str) -> None:
        sizes = config.encoders[name]
        super().__init__(
            MetaLMAttention(config, sizes["hidden_size"], sizes["num_attention_heads"]),
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_layers=sizes["num_hidden_layers"],
            normalization=sizes["normalization"],
            eps=config.layer_norm_eps,
        )
