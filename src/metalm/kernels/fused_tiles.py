"""Tiles on CPU with PyTorch's own fused attention: one operation per tile, or batch of short runs, and pass.

The operation behind `scaled_dot_product_attention` on CPU also returns the log-sum-exp, and has a backward
that takes it, so tiles need no autograd of their own. A document or span of one shape is one tile, which the
operation blocks itself; only tiles of mixed rows get a mask, as large as the tile. Short runs of about one
length are gathered as the rows of one operation's batch; runs of one length that lie end to end are such a
batch without a copy. Where the operation is slow in half precision, it gets operands in single precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.segments import Segments, find_segments
from metalm.kernels.tile_plan import RunBatch, Tile, plan_runs

_FAST_BF16_KEYS = 512
"""From so many keys on, the operation's backward in bf16 takes no longer than in fp32; with 64 it takes three
times as long. In fp16 it takes longer at any length, up to ten times, and so does the forward."""


def fused_tiled_attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
    """Attention `[B, H, Sq, D]` of q over k and v `[B, H, Sk, D]`, on CPU."""
    runs = mask.derived("equal runs", _equal_runs)
    if runs is not None:
        options = {"is_causal": runs.is_causal, "attn_mask": None, "scale": scale}
        of_runs: Tensor = _EqualRuns.apply(*(runs.cut(x).transpose(1, 2) for x in (q, k, v)), options)
        batch_size, num_heads, length, head_size = q.shape
        return of_runs.transpose(1, 2).reshape(batch_size, length, num_heads, head_size).transpose(1, 2)
    dtype = _wide(q.dtype)
    work = mask.derived(f"work of {len(q)} rows, {dtype}", lambda mask: _Work.of(mask, len(q), dtype))
    out: Tensor = _FusedTiledAttention.apply(q, k, v, work, scale)
    return out


def _equal_runs(mask: IntervalMask) -> Segments | None:
    """A mask's segments, if they are of one length and none is padding."""
    if mask.num_queries != mask.num_keys:
        return None
    segments = mask.segments or find_segments(mask.start.numpy(), mask.end.numpy())
    return segments if segments is not None and segments.is_uniform(mask.start.numel()) else None


def _forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The operation: `[N, H, Sq, D]` of q's dtype, and the log-sum-exp `[N, H, Sq]` in fp32 or wider."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    out, log_sum = run(q.to(dtype), k.to(dtype), v.to(dtype), **options)
    return out.to(q.dtype), log_sum


def _backward(*operands: Tensor, **options: Any) -> list[Tensor]:
    """Its backward, of `(grad, q, k, v, out, log_sum)`: gradients of q, k and v in their dtype."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    *narrow, log_sum = operands
    _, q, k, *_ = narrow
    is_slow = q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and k.shape[2] < _FAST_BF16_KEYS)
    dtype = torch.float32 if is_slow else q.dtype
    grads = run(*(x.to(dtype) for x in narrow), log_sum, dropout_p=0.0, **options)
    return [grad.to(q.dtype) for grad in grads]


class _EqualRuns(torch.autograd.Function):
    """One operation over `[runs, H, S, D]`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        out: Tensor
        out, log_sum = _forward(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grads[0], *ctx.saved_tensors, **ctx.options), None


@dataclass(frozen=True, eq=False)
class _Batch:
    """Short runs `[N, queries]` over `[N, keys]`.

    Args:
        queries: int64 `[N, queries]`, which elements they are; padding has the run's first one.
        keys: int64 `[N, keys]`, the same.
        to_queries: `queries` with one past the last element in the padding.
        to_keys: `keys` with the same.
        padding: int64, where in `[N * queries]` there is padding.
        options: the operation's, for their mask.
    """

    queries: Tensor
    keys: Tensor
    to_queries: Tensor
    to_keys: Tensor
    padding: Tensor
    options: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Work:
    """The operations of a mask.

    Args:
        mask: the mask.
        dtype: of the masks that the operation gets: fp32 for half precision, too.
        batches: of short runs.
        tiles: the rest, by row of the mask.
        blind: int64, the elements `[B * Sq]` of q that see nothing.
        unseen: int64, those of k `[B * Sk]` that no query sees; None if a key is in two of the operations.
    """

    mask: IntervalMask
    dtype: torch.dtype
    batches: list[_Batch]
    tiles: list[list[Tile]]
    blind: Tensor
    unseen: Tensor | None

    @classmethod
    def of(cls, mask: IntervalMask, batch_size: int, dtype: torch.dtype) -> _Work:
        """The operations for q of `batch_size` rows, with masks of `dtype`."""
        plan = mask.derived("runs", plan_runs)
        num_rows = batch_size if mask.batch_size == 1 else 1
        batches = [_batch(mask, batch, num_rows, dtype) for batch in plan.batches]
        seen = np.zeros((mask.batch_size, mask.num_keys), np.int64)
        for row, tiles in enumerate(plan.tiles):
            for tile in tiles:
                seen[row, tile.key_first : tile.key_last] += 1
        for batch in plan.batches:
            np.add.at(seen.reshape(-1), batch.keys[batch.keys >= 0], 1)
        blind = (mask.end <= mask.start).repeat(num_rows, 1).view(-1).nonzero()[:, 0]
        unseen = None
        if (seen <= 1).all():
            unseen = torch.from_numpy(np.tile(seen.reshape(-1) == 0, num_rows)).nonzero()[:, 0]
        return cls(mask, dtype, batches, plan.tiles, blind, unseen)

    def pieces(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], dict[str, Any]]]:
        """Of each tile its queries and its keys in `[B, H, S, D]`, and the operation's options for its mask.

        The mask of a tile is made when it is asked for: all of them together would be quadratic.
        """
        for row, tiles in enumerate(self.tiles):
            rows = slice(row, row + 1) if len(self.tiles) > 1 else slice(None)
            for tile in tiles:
                queries = (rows, slice(None), slice(tile.query_first, tile.query_last))
                keys = (rows, slice(None), slice(tile.key_first, tile.key_last))
                bias = _tile_mask(self.mask, row, tile, self.dtype)
                yield queries, keys, {"is_causal": tile.is_causal, "attn_mask": bias}


class _FusedTiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: _Work, scale: float) -> Tensor:
        out = _Elements(q.shape, q.dtype, work.blind)
        saved: list[Tensor] = []
        for batch in work.batches:
            runs = (_gather(q, batch.queries), _gather(k, batch.keys), _gather(v, batch.keys))
            out_runs, log_sum = _forward(*runs, **batch.options, scale=scale)
            out.put(batch.to_queries, out_runs)
            saved += [*runs, out_runs, log_sum]
        if any(work.tiles):
            log_sum = q.new_zeros(q.shape[:3], dtype=_wide(q.dtype))
            for at, keys, options in work.pieces():
                out.whole[at], log_sum[at] = _forward(q[at], k[keys], v[keys], **options, scale=scale)
            saved += [q, k, v, out.whole, log_sum]
        ctx.save_for_backward(*saved)
        ctx.work, ctx.scale = work, scale
        ctx.shapes = (q.shape, k.shape)
        return out.whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        work, scale, saved = ctx.work, ctx.scale, list(ctx.saved_tensors)
        grad, (q_shape, k_shape) = grads[0], ctx.shapes
        grad_q = _Elements(q_shape, grad.dtype, work.blind)
        adds = work.unseen is None
        # Several tiles may add to one key: in the precision of the log-sum-exp.
        dtype = _wide(grad.dtype) if adds else grad.dtype
        grad_k, grad_v = (_Elements(k_shape, dtype, work.unseen) for _ in range(2))
        for batch in work.batches:
            runs, saved = saved[:5], saved[5:]
            grad_runs = _gather(grad, batch.queries, zero_at=batch.padding)
            of_q, of_k, of_v = _backward(grad_runs, *runs, **batch.options, scale=scale)
            grad_q.put(batch.to_queries, of_q)
            for sums, of_runs in ((grad_k, of_k), (grad_v, of_v)):
                sums.add(batch.to_keys, of_runs) if adds else sums.put(batch.to_keys, of_runs)
        for at, keys, options in work.pieces():
            q, k, v, out, log_sum = saved
            parts = (grad[at], q[at], k[keys], v[keys], out[at], log_sum[at])
            grad_q.whole[at], of_k, of_v = _backward(*parts, **options, scale=scale)
            for sums, of_tile in ((grad_k, of_k), (grad_v, of_v)):
                if adds:
                    sums.whole[keys] += of_tile
                else:
                    sums.whole[keys] = of_tile
        return grad_q.whole, grad_k.whole.to(grad.dtype), grad_v.whole.to(grad.dtype), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype's numbers are kept in: fp32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


class _Elements:
    """`[B, H, S, D]` in the memory of `[B, S, H, D]`, as the products on both sides have it.

    Behind the last element there is one more, that what is padding is written to. Those of `zero_at`, or all,
    begin with zeros; the others are to be written.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, zero_at: Tensor | None) -> None:
        batch_size, num_heads, length, size = shape
        flat = (batch_size * length + 1, num_heads * size)
        if zero_at is None:
            self.flat = torch.zeros(flat, dtype=dtype)
        else:
            self.flat = torch.empty(flat, dtype=dtype).index_fill_(0, zero_at, 0)
        self.whole = self.flat[:-1].view(batch_size, length, num_heads, size).transpose(1, 2)

    def put(self, where: Tensor, runs: Tensor) -> None:
        """Write runs `[N, H, S, D]` to the elements `where`, `[N, S]`."""
        self.flat.index_copy_(0, where.view(-1), runs.transpose(1, 2).reshape(where.numel(), -1))

    def add(self, where: Tensor, runs: Tensor) -> None:
        """Add them."""
        runs = runs.transpose(1, 2).reshape(where.numel(), -1)
        self.flat.index_add_(0, where.view(-1), runs.to(self.flat.dtype))


def _gather(x: Tensor, where: Tensor, zero_at: Tensor | None = None) -> Tensor:
    """Elements `[N, S]` of x `[B, H, S, D]`, as `[N, H, S, D]`."""
    _, num_heads, _, head_size = x.shape
    found = x.transpose(1, 2).reshape(-1, num_heads * head_size).index_select(0, where.view(-1))
    if zero_at is not None:
        found.index_fill_(0, zero_at, 0)
    return found.view(*where.shape, num_heads, head_size).transpose(1, 2)


def _batch(mask: IntervalMask, runs: RunBatch, num_rows: int, dtype: torch.dtype) -> _Batch:
    """Of all `num_rows` rows that share a mask of one row; else of a mask's own."""
    queries, to_queries = _of_rows(runs.queries, num_rows, mask.start.numel())
    keys, to_keys = _of_rows(runs.keys, num_rows, mask.batch_size * mask.num_keys)
    bias = None
    if not runs.is_causal:
        element = _with_first(runs.queries)
        start, end = (bound.numpy().reshape(-1)[element] for bound in (mask.start, mask.end))
        key = start[:, :1] + np.arange(runs.keys.shape[1])
        is_hidden = (key[:, None] < start[..., None]) | (key[:, None] >= end[..., None])
        if is_hidden.any():
            hidden = torch.from_numpy(is_hidden)[:, None].repeat(num_rows, 1, 1, 1)
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    padding = torch.from_numpy(np.tile(runs.queries.reshape(-1) < 0, num_rows)).nonzero()[:, 0]
    options = {"is_causal": runs.is_causal, "attn_mask": bias}
    return _Batch(queries, keys, to_queries, to_keys, padding, options)


def _of_rows(elements: np.ndarray, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Elements `[N, S]` of one row in each of `num_rows`: where to read them, and where to write them."""
    offset = np.arange(num_rows)[:, None, None] * length
    is_real = np.broadcast_to(elements >= 0, (num_rows, *elements.shape)).reshape(-1, elements.shape[1])
    read = (_with_first(elements) + offset).reshape(-1, elements.shape[1])
    return torch.from_numpy(read), torch.from_numpy(np.where(is_real, read, num_rows * length))


def _with_first(elements: np.ndarray) -> np.ndarray:
    """The first element of each run in its padding."""
    return np.where(elements >= 0, elements, elements[:, :1])


def _tile_mask(mask: IntervalMask, row: int, tile: Tile, dtype: torch.dtype) -> Tensor | None:
    """Additive mask `[1, 1, queries, keys]`, where the tile's shape alone does not say what is seen."""
    if tile.is_causal or tile.is_full:
        return None
    key = torch.arange(tile.key_first, tile.key_last)
    start, end = (bound[row, tile.query_first : tile.query_last, None] for bound in (mask.start, mask.end))
    hidden = (key < start) | (key >= end)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None]
