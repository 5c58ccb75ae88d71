"""A transformer layer of the encoders: attention over packed spans, and one feed-forward or VLMo's several.

Shape letters: L packed elements, D hidden, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.config import EncoderConfig
from metalm.kernels import IntervalMask, RelativeBias, interval_attention
from metalm.model.deepnorm import deepnorm_alpha
from metalm.model.dropout import SITES_PER_LAYER, SpanDropout

LAYER_NORM_EPS = 1e-5
Routes = dict[str, dict[str, Tensor]]
"""Which elements go through which feed-forward: see `metalm.batch.EncoderShare.routes`."""


class FeedForward(nn.Module):
    """Two linear maps with GELU between."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.ffn_in = nn.Linear(config.hidden_size, config.feed_forward_size)
        self.ffn_out = nn.Linear(config.feed_forward_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.ffn_out(functional.gelu(self.ffn_in(hidden)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, post-LN with DeepNorm or pre-LN."""

    def __init__(self, config: EncoderConfig, number: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.first_site = SITES_PER_LAYER * number
        self.post_norm = config.normalization == "deepnorm"
        self.residual_scale = deepnorm_alpha(config.num_layers) if self.post_norm else 1.0
        self.attention_norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.feed_forwards = nn.ModuleDict(
            {name: FeedForward(config) for name in config.feed_forwards(number)}
        )

    def forward(
        self,
        hidden: Tensor,
        mask: IntervalMask,
        bias: RelativeBias | None,
        routes: Routes,
        dropout: SpanDropout | None,
    ) -> Tensor:
        """[L, D] to [L, D]."""
        if self.post_norm:
            attended = self._attend(hidden, mask, bias, dropout)
            hidden = self.attention_norm(self.residual_scale * hidden + attended)
            return self.ffn_norm(self.residual_scale * hidden + self._feed_forward(hidden, routes, dropout))
        hidden = hidden + self._attend(self.attention_norm(hidden), mask, bias, dropout)
        return hidden + self._feed_forward(self.ffn_norm(hidden), routes, dropout)

    def _attend(
        self, hidden: Tensor, mask: IntervalMask, bias: RelativeBias | None, dropout: SpanDropout | None
    ) -> Tensor:
        length, width = hidden.shape
        qkv = self.qkv(hidden).view(length, 3, self.num_heads, width // self.num_heads)
        query, key, value = (part.transpose(0, 1)[None] for part in qkv.unbind(1))  # [1, H, L, K]
        dropped = {} if dropout is None else dropout.of_attention(self.first_site)
        attended = interval_attention(query, key, value, mask, bias=bias, **dropped)
        output = self.attention_output(attended[0].transpose(0, 1).reshape(length, width))
        return output if dropout is None else dropout.drop(output, self.first_site + 1)

    def _feed_forward(self, hidden: Tensor, routes: Routes, dropout: SpanDropout | None) -> Tensor:
        output = self._route(hidden, routes)
        return output if dropout is None else dropout.drop(output, self.first_site + 2)

    def _route(self, hidden: Tensor, routes: Routes) -> Tensor:
        if "shared" in self.feed_forwards:
            return self.feed_forwards["shared"](hidden)
        slots = routes["joint" if "joint" in self.feed_forwards else "separate"]
        # A route without elements runs as well: ZeRO gathers its weights on all ranks together.
        parts = [part(hidden.index_select(0, slots[name])) for name, part in self.feed_forwards.items()]
        order = torch.cat([slots[name] for name in self.feed_forwards])
        return torch.zeros_like(hidden).index_copy(0, order, torch.cat(parts).to(hidden.dtype))
