"""A transformer layer of the encoders: attention over packed spans, and one feed-forward or VLMo's several.

Shape letters: L packed elements, D hidden, H heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metalm.config import EncoderConfig
from metalm.kernels import (
    HiddenPattern,
    IntervalMask,
    RelativeBias,
    activate,
    interval_attention,
    residual_norm,
    residual_sum,
    turn,
)
from metalm.model.activations import ACTIVATIONS
from metalm.model.deepnorm import deepnorm_alpha
from metalm.model.hidden_dropout import SITES_PER_LAYER, SpanDropout


@dataclass(frozen=True, eq=False)
class Where:
    """How positions enter attention, the same in all layers."""

    bias: RelativeBias | None
    rotation: Tensor | None
    """[2, L, K / 2], of rotary positions."""


Routes = dict[str, dict[str, Tensor]]
"""Which elements go through which feed-forward: see `metalm.batch.EncoderShare.routes`."""


class EncoderNorm(nn.Module):
    """A layer norm or an RMS norm, of what a sublayer adds to the residual stream."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.norm == "layer_norm" else None

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None = None,
        *,
        residual_scale: float = 1.0,
        dropout: HiddenPattern | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[L, D] each: the normed sum, and the sum; see `residual_norm`."""
        found = residual_norm(
            branch,
            residual,
            self.weight,
            self.bias,
            kind=self.kind,
            eps=self.eps,
            residual_scale=residual_scale,
            dropout=dropout,
        )
        return found.normed, found.total


class FeedForward(nn.Module):
    """Two linear maps with an activation between; of a gated one the first has gate and value."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation, self.is_gated = ACTIVATIONS[config.activation]
        width = config.feed_forward_size * (2 if self.is_gated else 1)
        self.ffn_in = nn.Linear(config.hidden_size, width, bias=config.biases)
        self.ffn_out = nn.Linear(config.feed_forward_size, config.hidden_size, bias=config.biases)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.ffn_out(activate(self.ffn_in(hidden), self.activation, is_gated=self.is_gated))


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
        self.attention_norm = EncoderNorm(config)
        rows = (config.num_heads + 2 * config.key_value_heads) * config.head_size
        self.qkv = nn.Linear(hidden, rows, bias=config.biases)
        self.attention_output = nn.Linear(hidden, hidden, bias=config.biases)
        self.ffn_norm = EncoderNorm(config)
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
        of_attention = None if dropout is None else dropout.at(self.first_site + 1)
        of_feed_forward = None if dropout is None else dropout.at(self.first_site + 2)
        if self.post_norm:
            attended = self._attend(hidden, mask, where, dropout)
            scale = self.residual_scale
            hidden, _ = self.attention_norm(hidden, attended, residual_scale=scale, dropout=of_attention)
            output = self._feed_forward(hidden, routes)
            return self.ffn_norm(hidden, output, residual_scale=scale, dropout=of_feed_forward)[0]
        normed, hidden = self.attention_norm(hidden)
        attended = self._attend(normed, mask, where, dropout)
        normed, hidden = self.ffn_norm(hidden, attended, dropout=of_attention)
        return residual_sum(self._feed_forward(normed, routes), hidden, dropout=of_feed_forward)

    def _attend(
        self, hidden: Tensor, mask: IntervalMask, where: Where, dropout: SpanDropout | None
    ) -> Tensor:
        length, width = hidden.shape
        heads = self.qkv(hidden).view(length, -1, self.head_size)  # [L, H + 2 Hkv, K]
        if where.rotation is not None:
            value = heads[:, self.num_heads + self.key_value_heads :]
            heads = turn(heads[:, : self.num_heads + self.key_value_heads], where.rotation)
            query, key = heads.split((self.num_heads, self.key_value_heads), dim=1)
        else:
            sizes = (self.num_heads, self.key_value_heads, self.key_value_heads)
            query, key, value = heads.split(sizes, dim=1)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        dropped = {} if dropout is None else dropout.of_attention(self.first_site)
        attended = interval_attention(query, key, value, mask, bias=where.bias, **dropped)
        output: Tensor = self.attention_output(attended[0].transpose(0, 1).reshape(length, width))
        return output

    def _feed_forward(self, hidden: Tensor, routes: Routes) -> Tensor:
        if "shared" in self.feed_forwards:
            return self.feed_forwards["shared"](hidden)
        slots = routes["joint" if "joint" in self.feed_forwards else "separate"]
        # A route without elements runs as well: ZeRO gathers its weights on all ranks together.
        parts = [part(hidden.index_select(0, slots[name])) for name, part in self.feed_forwards.items()]
        order = torch.cat([slots[name] for name in self.feed_forwards])
        return torch.zeros_like(hidden).index_copy(0, order, torch.cat(parts).to(hidden.dtype))
