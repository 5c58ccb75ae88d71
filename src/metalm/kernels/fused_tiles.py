"""Tiles on CPU with PyTorch's own fused attention: one operation per tile and pass.

The operation behind `scaled_dot_product_attention` on CPU also returns the log-sum-exp, and has a backward
that takes it, so tiles need no autograd of their own. A document or span of one shape is one tile, which the
operation blocks itself; only tiles of mixed rows get a mask, as large as the tile. Runs of one length and
shape that lie end to end are the rows of one operation's batch, without a copy.
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
    runs = mask.derived("equal runs", _equal_runs)
    if runs is not None and len(q) == 1 and q.shape == k.shape:
        length, is_causal = runs
        rows = (x[0].unflatten(1, (-1, length)).transpose(0, 1) for x in (q, k, v))
        of_rows: Tensor = _Rows.apply(*rows, is_causal, scale)
        return of_rows.transpose(0, 1).flatten(1, 2)[None]
    out: Tensor = _FusedTiledAttention.apply(q, k, v, mask, scale)
    return out


def _equal_runs(mask: IntervalMask) -> tuple[int, bool] | None:
    """Length of a mask's tiles, and whether they are causal, if all are whole runs of one kind end to end."""
    tiles, *others = mask.derived("whole runs", plan_whole_runs)
    if others or not tiles or mask.num_queries != mask.num_keys:
        return None
    length, is_causal = tiles[0].query_last, tiles[0].is_causal
    for number, tile in enumerate(tiles):
        own = (number * length, (number + 1) * length)
        same = (tile.query_first, tile.query_last) == (tile.key_first, tile.key_last) == own
        if not same or tile.is_causal != is_causal or not (is_causal or tile.is_full):
            return None
    return (length, is_causal) if tiles[-1].query_last == mask.num_queries else None


class _Rows(torch.autograd.Function):
    """One operation over `[runs, H, S, D]`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
        out: Tensor
        out, log_sum = _forward(q, k, v, is_causal=is_causal, attn_mask=None, scale=scale)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.options = {"is_causal": is_causal, "attn_mask": None, "scale": scale}
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grads[0], *ctx.saved_tensors, dropout_p=0.0, **ctx.options), None, None


class _FusedTiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
        blank = _blank if mask.derived("cut whole", _is_cut_whole) else _zeros
        out = blank(q, q.dtype)
        log_sum = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for (queries, keys), options in _tiles(mask, q):
            out[queries], log_sum[queries] = _forward(q[queries], k[keys], v[keys], **options, scale=scale)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        is_cut_whole = ctx.mask.derived("cut whole", _is_cut_whole)
        blank = _blank if is_cut_whole else _zeros
        grad_q = blank(q, q.dtype)
        # Several tiles may add to one key: in the precision of the log-sum-exp.
        grad_k, grad_v = (blank(x, x.dtype if is_cut_whole else log_sum.dtype) for x in (k, v))
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
            if is_cut_whole:
                grad_k[keys], grad_v[keys] = tile_grad_k, tile_grad_v
            else:
                grad_k[keys] += tile_grad_k
                grad_v[keys] += tile_grad_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _is_cut_whole(mask: IntervalMask) -> bool:
    """Whether each query and each key is in one tile of its row, and one alone."""
    for tiles in mask.derived("whole runs", plan_whole_runs):
        edges = [(0, 0), *((tile.query_last, tile.key_last) for tile in tiles)]
        if edges != [
            *((tile.query_first, tile.key_first) for tile in tiles),
            (mask.num_queries, mask.num_keys),
        ]:
            return False
    return True


def _blank(like: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, H, S, D]` in the memory of `[B, S, H, D]`, as the products on both sides have it."""
    batch_size, heads, length, size = like.shape
    return like.new_empty(batch_size, length, heads, size, dtype=dtype).transpose(1, 2)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return _blank(like, dtype).zero_()


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
