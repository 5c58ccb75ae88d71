"""An additive attention bias that depends on head and distance only, as in T5: no S x S tensor.

A bias is kept as one value per head and distance. Documents and spans are contiguous and only their own
positions see each other, so the distance of two indices is the distance of two positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def t5_relative_buckets(
    distance: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """T5's bucket (int64) of `distance`, the key's position minus the query's, any shape and integer dtype.

    Half of the buckets of a direction hold one distance each; the other half widen by a constant factor up to
    `max_distance`, and the last takes all beyond. Bidirectional: half of the buckets for each direction; else
    all keys after the query share bucket 0. Source: Raffel et al. 2020, section 2.1.
    """
    distance = distance.long()
    if bidirectional:
        num_buckets //= 2
        offset = torch.where(distance > 0, num_buckets, 0)
        reach = distance.abs()
    else:
        offset = torch.zeros_like(distance)
        reach = (-distance).clamp(min=0)
    num_exact = num_buckets // 2
    ratio = reach.clamp(min=1).float() / num_exact
    widening = torch.log(ratio) / math.log(max_distance / num_exact) * (num_buckets - num_exact)
    wide = (num_exact + widening.long()).clamp(max=num_buckets - 1)
    return offset + torch.where(reach < num_exact, reach, wide)


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """Bias `table[h, bucket(k - q)]` added to the scaled scores.

    Args:
        table: floating `[H, num_buckets]`, the learnable values of this rank's query heads.
        max_distance: distance from which all share the last bucket.
        bidirectional: separate buckets for keys after the query.
    """

    table: Tensor
    max_distance: int = 128
    bidirectional: bool = True
    _derived: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def by_distance(self, num_queries: int, num_keys: int) -> Tensor:
        """float32 or wider `[H, Sq + Sk - 1]`: column `k - q + Sq - 1` holds the bias of distance `k - q`.

        Differentiable in the table; linear in the lengths. Kept: all layers of a forward share one bias. Who
        computes layers again in the backward calls it before the first.
        """
        if (num_queries, num_keys) not in self._derived:
            self._derived[num_queries, num_keys] = self._by_distance(num_queries, num_keys)
        return self._derived[num_queries, num_keys]

    def with_values(self, by_distance: Tensor, num_queries: int, num_keys: int) -> RelativeBias:
        """A bias that gives `by_distance`, in its own memory, for these lengths; the table learns nothing."""
        other = RelativeBias(self.table.detach(), self.max_distance, self.bidirectional)
        other._derived[num_queries, num_keys] = by_distance
        return other

    def _by_distance(self, num_queries: int, num_keys: int) -> Tensor:
        distance = torch.arange(1 - num_queries, num_keys, device=self.table.device)
        num_buckets = self.table.shape[1]
        bucket = t5_relative_buckets(distance, num_buckets, self.max_distance, self.bidirectional)
        dtype = torch.promote_types(self.table.dtype, torch.float32)
        return self.table.to(dtype).index_select(1, bucket)


def bias_tile(by_distance: Tensor, num_queries: int, queries: slice, keys: slice) -> Tensor:
    """The bias `[H, queries, keys]` of a rectangle, from `RelativeBias.by_distance`'s `[H, Sq + Sk - 1]`."""
    first = keys.start - (queries.stop - 1) + num_queries - 1
    num_rows, num_cols = queries.stop - queries.start, keys.stop - keys.start
    windows = by_distance[:, first : first + num_rows + num_cols - 1].unfold(1, num_cols, 1)
    return windows.flip(1)


def add_bias_tile_gradient(
    grad: Tensor, tile_grad: Tensor, num_queries: int, queries: slice, keys: slice
) -> None:
    """Adds a rectangle's score gradients `[H, queries, keys]`, summed by diagonal, to `[H, Sq + Sk - 1]`."""
    num_heads, num_rows, num_cols = tile_grad.shape
    first = keys.start - (queries.stop - 1) + num_queries - 1
    width = num_rows + num_cols - 1
    # Rows padded to width + 1 and read back at width: each row moves right by one column.
    skewed = torch.nn.functional.pad(tile_grad.flip(1), (0, num_rows)).flatten(1)[:, : num_rows * width]
    grad[:, first : first + width] += skewed.view(num_heads, num_rows, width).sum(1)
