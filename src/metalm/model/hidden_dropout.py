"""Dropout of encoders and decoder: a function of the row's seed, the place in it, and the site.

So the same is dropped on any topology, with any micro-batch, after any resume, and when a layer is
computed again. Sites number the dropouts of a component: three a layer (attention weights, what attention
adds, what the feed-forward adds), and after them that of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metalm.kernels import HiddenPattern, site_seeds

SITES_PER_LAYER = 3


@dataclass(frozen=True, eq=False)
class SpanDropout:
    """Of an encoder's elements, wherever their spans are packed."""

    rate: float
    seeds: Tensor  # [L] int64, of the elements' spans
    positions: Tensor  # [L] int32, in their spans

    def at(self, site: int) -> HiddenPattern:
        """Of vectors [L, D]."""
        return HiddenPattern(self.rate, self.seeds, self.positions, site)

    def of_attention(self, site: int) -> dict[str, Any]:
        """Arguments of `interval_attention`."""
        seeds = site_seeds(self.seeds, site)[None]
        return {"dropout": self.rate, "dropout_seed": seeds, "dropout_positions": self.positions[None]}


@dataclass(frozen=True, eq=False)
class RowDropout:
    """Of the decoder's rows, on one of the ranks that work on them."""

    rate: float
    seeds: Tensor  # [B * S] int64, of the positions' rows
    positions: Tensor  # [B * S] int32: indices in the row
    held: slice
    """Of the positions, those that the rank holds between layers."""
    first_head: int
    """Of those that the rank attends with."""

    def at(self, site: int) -> HiddenPattern:
        """Of vectors [B * S, 1, D], of what the rank holds."""
        seeds, positions = self.seeds[self.held, None], self.positions[self.held, None]
        return HiddenPattern(self.rate, seeds, positions, site)

    def of_attention(self, site: int) -> dict[str, Any]:
        """Arguments of `interval_attention`."""
        return {
            "dropout": self.rate,
            "dropout_seed": site_seeds(self.seeds, site)[None],
            "dropout_positions": self.positions[None],
            "dropout_head_offset": self.first_head,
        }
