"""Tiles on CPU with PyTorch's own fused attention: one operation per tile and pass.

The operation behind `scaled_dot_product_attention` on CPU also returns the log-sum-exp, and has a backward
that takes it, so tiles need no autograd of their own. A document or span of one shape is one tile, which the
operation blocks itself; only tiles of mixed rows get a mask, as large as the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.tile_plan import Tile, plan_whole_runs

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def fused_tiled_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """Attention `[B, H, Sq, D]` of q over k and v `[B, H, Sk, D]`, on CPU."""
    out: Tensor = _FusedTiledAttention.apply(q, k, v, mask, scale)
    return out


class _FusedTiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
        out = torch.zeros_like(q)
        log_sum = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for (queries, keys), options in _tiles(mask, q):
            out[queries], log_sum[queries] = _forward(q[queries], k[keys], v[keys], **options, scale=scale)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        grad_q = torch.zeros_like(q)
        # Several tiles may add to one key: in the precision of the log-sum-exp.
        grad_k, grad_v = (torch.zeros_like(x, dtype=log_sum.dtype) for x in (k, v))
        for (queries, keys), options in _tiles(ctx.mask, q):
            grad_q[queries], tile_grad_k, tile_grad_v = _backward(
                grads[0][queries],
                q[queries],
                k[keys],
                v[keys],
                out[queries],
                log_sum[queries],
                dropout_p=0.0,
                **options,
                scale=ctx.scale,
            )
            grad_k[keys] += tile_grad_k
            grad_v[keys] += tile_grad_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _tiles(
    mask: IntervalMask, q: Tensor
) -> Iterator[tuple[tuple[tuple[slice, ...], tuple[slice, ...]], dict[str, Any]]]:
    """Where each tile's queries and keys are in `[B, H, S, D]`, and the operation's options for its mask."""
    plan = mask.derived("whole runs", plan_whole_runs)
    for row, tiles in enumerate(plan):
        rows = slice(row, row + 1) if len(plan) > 1 else slice(None)
        for tile in tiles:
            queries = slice(tile.query_first, tile.query_last)
            keys = slice(tile.key_first, tile.key_last)
            options = {"is_causal": tile.is_causal, "attn_mask": _tile_mask(mask, row, tile, q.dtype)}
            yield ((rows, slice(None), queries), (rows, slice(None), keys)), options


def _tile_mask(mask: IntervalMask, row: int, tile: Tile, dtype: torch.dtype) -> Tensor | None:
    """Additive mask `[1, 1, queries, keys]`, where the tile's shape alone does not say what is seen."""
    if tile.is_causal or tile.is_full:
        return None
    key = torch.arange(tile.key_first, tile.key_last)
    start, end = (bound[row, tile.query_first : tile.query_last, None] for bound in (mask.start, mask.end))
    hidden = (key < start) | (key >= end)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None]
