"""A transformer layer of the encoders: attention over packed spans, and one feed-forward or VLMo's several.

Shape letters: L packed elements, D hidden, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalm.config import EncoderConfig
from metalm.kernels import IntervalMask, RelativeBias, interval_attention
from metalm.model.deepnorm import deepnorm_alpha
from metalm.model.hidden_dropout import SITES_PER_LAYER, SpanDropout
from metalm.model.positions import turn

GELU = {"gelu": "none", "gelu_tanh": "tanh", "geglu_tanh": "tanh"}


@dataclass(frozen=True, eq=False)
class Where:
    """How positions enter attention, the same in all layers."""

    bias: RelativeBias | None
    angles: Tensor | None
    """[L, K], of rotary positions."""


Routes = dict[str, dict[str, Tensor]]
"""Which elements go through which feed-forward: see `metalm.batch.EncoderShare.routes`."""


def build_norm(config: EncoderConfig) -> nn.Module:
    """A layer norm or an RMS norm."""
    return (nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm)(
        config.hidden_size, eps=config.norm_eps
    )


class FeedForward(nn.Module):
    """Two linear maps with an activation between; of a gated one the first has gate and value."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation, self.is_gated = config.activation, config.is_gated
        width = config.feed_forward_size * (2 if config.is_gated else 1)
        self.ffn_in = nn.Linear(config.hidden_size, width, bias=config.biases)
        self.ffn_out = nn.Linear(config.feed_forward_size, config.hidden_size, bias=config.biases)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        wide = self.ffn_in(hidden)
        if self.is_gated:
            gate, value = wide.chunk(2, dim=-1)
            return self.ffn_out(self._activate(gate) * value)
        return self.ffn_out(self._activate(wide))

    def _activate(self, wide: Tensor) -> Tensor:
        if self.activation == "swiglu":
            return functional.silu(wide)
        return functional.gelu(wide, approximate=GELU[self.activation])


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, post-LN with DeepNorm or pre-LN."""

    def __init__(self, config: EncoderConfig, number: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, self.key_value_heads = config.num_heads, config.key_value_heads
        self.head_size = config.head_size
        self.first_site = SITES_PER_LAYER * number
        self.post_norm = config.normalization == "deepnorm"
        self.residual_scale = deepnorm_alpha(config.num_layers) if self.post_norm else 1.0
        self.attention_norm = build_norm(config)
        rows = (config.num_heads + 2 * config.key_value_heads) * config.head_size
        self.qkv = nn.Linear(hidden, rows, bias=config.biases)
        self.attention_output = nn.Linear(hidden, hidden, bias=config.biases)
        self.ffn_norm = build_norm(config)
        self.feed_forwards = nn.ModuleDict(
            {name: FeedForward(config) for name in config.feed_forwards(number)}
        )

    def forward(
        self,
        hidden: Tensor,
        mask: IntervalMask,
        where: Where,
        routes: Routes,
        dropout: SpanDropout | None,
    ) -> Tensor:
        """[L, D] to [L, D]."""
        if self.post_norm:
            attended = self._attend(hidden, mask, where, dropout)
            hidden = self.attention_norm(torch.add(attended, hidden, alpha=self.residual_scale))
            output = self._feed_forward(hidden, routes, dropout)
            return self.ffn_norm(torch.add(output, hidden, alpha=self.residual_scale))
        hidden = hidden + self._attend(self.attention_norm(hidden), mask, where, dropout)
        return hidden + self._feed_forward(self.ffn_norm(hidden), routes, dropout)

    def _attend(
        self, hidden: Tensor, mask: IntervalMask, where: Where, dropout: SpanDropout | None
    ) -> Tensor:
        length, width = hidden.shape
        heads = (
            self.qkv(hidden).view(length, -1, self.head_size).transpose(0, 1)[None]
        )  # [1, H + 2 Hkv, L, K]
        sizes = (self.num_heads, self.key_value_heads, self.key_value_heads)
        query, key, value = heads.split(sizes, dim=1)
        if where.angles is not None:
            query, key = turn(query, where.angles), turn(key, where.angles)
        dropped = {} if dropout is None else dropout.of_attention(self.first_site)
        attended = interval_attention(query, key, value, mask, bias=where.bias, **dropped)
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
