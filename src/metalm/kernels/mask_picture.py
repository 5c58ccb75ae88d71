"""A mask as an image: which pairs are visible, and which blocks a kernel skips, tests, or takes whole."""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.kernels.interval_mask import IntervalMask

SKIPPED = (244, 244, 244)
PARTIAL_HIDDEN = (250, 219, 176)
PARTIAL_VISIBLE = (226, 127, 38)
FULL = (38, 92, 150)
LEGEND = {
    "skipped block": SKIPPED,
    "partial block, hidden pair": PARTIAL_HIDDEN,
    "partial block, visible pair": PARTIAL_VISIBLE,
    "full block": FULL,
}


def block_states(mask: IntervalMask, block_q: int, block_k: int) -> Tensor:
    """uint8 `[B, query blocks, key blocks]`: 0 skipped, 1 partial, 2 full."""
    ranges = mask.block_ranges(block_q, block_k)
    key_block = torch.arange(-(-mask.num_keys // block_k), device=mask.device)
    visited = (key_block >= ranges.first[..., None]) & (key_block < ranges.last[..., None])
    full = (key_block >= ranges.full_first[..., None]) & (key_block < ranges.full_last[..., None])
    return visited.to(torch.uint8) + full.to(torch.uint8)


def mask_image(mask: IntervalMask, row: int, block_q: int, block_k: int) -> Tensor:
    """uint8 `[Sq, Sk, 3]` of one batch row, one pixel per pair, in the colours of `LEGEND`."""
    states = block_states(mask, block_q, block_k)[row].long()
    states = states.repeat_interleave(block_q, 0)[: mask.num_queries]
    states = states.repeat_interleave(block_k, 1)[:, : mask.num_keys]
    visible = mask.to_dense()[row].long()
    # By state and visibility; the pairs that cannot be are as their block.
    colours = torch.tensor(
        [[SKIPPED, SKIPPED], [PARTIAL_HIDDEN, PARTIAL_VISIBLE], [FULL, FULL]],
        dtype=torch.uint8,
        device=mask.device,
    )
    return colours[states, visible]
