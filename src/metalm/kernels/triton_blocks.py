"""Which blocks of the other side each block of rows visits, told once for all layers and heads of a mask.

An attention kernel that looked for them itself would wait for its intervals, then for four reductions over
them, before it could ask for its first keys.
"""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metalm.kernels.interval_mask import IntervalMask


@triton.jit(do_not_specialize=["num_rows", "num_others"])
def block_ranges_kernel(
    start_ptr, end_ptr, ranges_ptr, num_rows, num_others, ROWS: tl.constexpr, OTHERS: tl.constexpr
):
    """ranges int32 `[B, blocks of rows, 4]`. Grid: (blocks of rows, B)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    start = tl.load(start_ptr + tl.program_id(1) * num_rows + rows, mask=inside, other=0)
    end = tl.load(end_ptr + tl.program_id(1) * num_rows + rows, mask=inside, other=0)
    visible = end > start
    first = tl.min(tl.where(visible, start, num_others), 0) // OTHERS * OTHERS
    last = tl.cdiv(tl.max(tl.where(visible, end, 0), 0), OTHERS) * OTHERS
    full_first = tl.max(tl.where(inside, tl.where(visible, start, num_others), 0), 0)
    full_first = tl.cdiv(full_first, OTHERS) * OTHERS
    full_last = tl.min(tl.where(inside, tl.where(visible, end, 0), num_others), 0) // OTHERS * OTHERS
    has_full = full_first < full_last
    ranges_ptr += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(ranges_ptr, first)
    tl.store(ranges_ptr + 1, tl.where(has_full, full_first, last))
    tl.store(ranges_ptr + 2, tl.where(has_full, full_last, last))
    tl.store(ranges_ptr + 3, last)


def block_ranges(mask: IntervalMask, rows: int, others: int) -> Tensor:
    """Of each block of `rows` rows, in multiples of `others`; kept with the mask.

    Returns:
        int32 `[B, blocks, 4]`: begin, full_begin, full_end, end. `[begin, end)` of the other side is to be
        visited, and all rows of the block see all of `[full_begin, full_end)`.
    """

    def build(mask: IntervalMask) -> Tensor:
        grid = (triton.cdiv(mask.num_queries, rows), mask.batch_size)
        ranges = torch.empty((grid[1], grid[0], 4), dtype=torch.int32, device=mask.device)
        start, end = mask.start.contiguous(), mask.end.contiguous()
        block_ranges_kernel[grid](
            start, end, ranges, mask.num_queries, mask.num_keys, ROWS=rows, OTHERS=others
        )
        return ranges

    return mask.derived(f"blocks of {rows} over {others}", build)


@triton.jit
def load_block_range(ranges_ptr, stride_mask, row, block, num_blocks):
    """What `block_ranges` told of a block: begin, full_begin, full_end, end."""
    # One row of intervals may hold for all of the batch.
    ranges_ptr += (tl.where(stride_mask > 0, row, 0) * num_blocks + block) * 4
    return tl.load(ranges_ptr), tl.load(ranges_ptr + 1), tl.load(ranges_ptr + 2), tl.load(ranges_ptr + 3)
