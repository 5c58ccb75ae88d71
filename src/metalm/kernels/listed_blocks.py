"""Block ranges as lists of block numbers, the form in which FlashAttention 4 and FlexAttention take them.

Made on the mask's device of its block ranges, without waiting: lists have room for every block, and how much
of one holds is a tensor too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metalm.kernels.interval_mask import BlockRanges


class ListedBlocks(NamedTuple):
    """Key blocks of each block of queries: int32 counts `[B, 1, M]` and numbers `[B, 1, M, N]`, ascending.

    Numbers beyond a list's count mean nothing, but are of blocks that exist.
    """

    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor

    def repeated(self, num_rows: int) -> ListedBlocks:
        """Those of `num_rows` rows of a batch that all have these of one row."""
        return ListedBlocks(*(x.repeat(num_rows, *(1,) * (x.dim() - 1)) for x in self))


def list_blocks(ranges: BlockRanges, num_blocks: int) -> ListedBlocks:
    """The blocks of ranges: those that need a test per pair, and those that are visible as a whole.

    Args:
        ranges: of `IntervalMask.block_ranges`, `[B, M]`.
        num_blocks: key blocks N in all.
    """
    place = torch.arange(num_blocks, dtype=torch.int32, device=ranges.first.device)
    num_full = ranges.full_last - ranges.full_first
    num_partial = ranges.last - ranges.first - num_full
    # Partial blocks lie on both sides of the full ones.
    is_before = place < (ranges.full_first - ranges.first)[..., None]
    partial = place + ranges.first[..., None] + torch.where(is_before, 0, num_full[..., None])
    full = place + ranges.full_first[..., None]
    numbers = (x.clamp(max=num_blocks - 1).int()[:, None] for x in (partial, full))
    counts = (x.int()[:, None].contiguous() for x in (num_partial, num_full))
    (partial, full), (partial_count, full_count) = numbers, counts
    return ListedBlocks(partial_count, partial, full_count, full)
