"""Attention over interval masks tile by tile, for CPU and devices without Triton, in linear memory.

A tile is a few queries and the keys they see: matrix products do the work, and the mask is applied only to
the columns that not all of the queries see. Saved for the backward are the output and each row's log-sum-exp.
Scores are float32 (float64 for float64 inputs) whatever the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metalm.kernels.dropout import DropoutPattern
from metalm.kernels.fused_tiles import fused_tiled_attention
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.relative_bias import add_bias_tile_gradient, bias_tile
from metalm.kernels.tile_plan import Tile, plan_tiles

# Keys per product: bounds a tile's scores, so that they stay in cache.
_MAX_KEYS = 1024


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    bias: Tensor | None,
    scale: float,
    dropout: DropoutPattern | None,
) -> Tensor:
    """Attention `[B, H, Sq, D]` of q over k and v `[B, Hkv, Sk, D]`; reads the mask on the host once.

    Args:
        bias: `[H, Sq + Sk - 1]` by distance, see `RelativeBias.by_distance`; or None.
        dropout: which weights are dropped, if any.
    """
    num_heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if q.device.type == "cpu" and bias is None and dropout is None:
        return fused_tiled_attention(q, k, v, mask, scale)
    options = _Options(mask, num_heads, scale, dropout)
    out: Tensor = _TiledAttention.apply(q, k, v, bias, options)
    return out


@dataclass(frozen=True)
class _Options:
    mask: IntervalMask
    num_heads: int
    scale: float
    dropout: DropoutPattern | None


@dataclass(frozen=True)
class _Rectangle:
    """A tile's queries times some of its keys, for `heads`: whole batch rows of flattened `[B * H, ...]`."""

    tile: Tile
    rows: slice
    heads: slice
    keys: slice

    @property
    def queries(self) -> slice:
        return slice(self.tile.query_first, self.tile.query_last)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        options: _Options,
    ) -> Tensor:
        flat_q, flat_k, flat_v = (_flatten(x) for x in (q, k, v))
        out = torch.zeros_like(flat_q)
        # Plus infinity makes every weight of a row that sees nothing zero.
        log_sum = flat_q.new_full(flat_q.shape[:2], float("inf"))
        for rectangles in _rectangles(q.shape[0], options):
            heads, queries = rectangles[0].heads, rectangles[0].queries
            out[heads, queries], log_sum[heads, queries] = _attend(
                flat_q, flat_k, flat_v, bias, options, rectangles
            )
        out = out.view(q.shape).to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, out, log_sum)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, log_sum = ctx.saved_tensors
        options: _Options = ctx.options
        flat_q, flat_k, flat_v, flat_grad = (_flatten(x) for x in (q, k, v, grads[0]))
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (flat_q, flat_k, flat_v))
        grad_bias = None if bias is None else torch.zeros_like(bias)
        # Sum over keys of weight times its gradient, which the softmax's backward subtracts.
        delta = (flat_grad * _flatten(out)).sum(-1, keepdim=True)
        for rectangle in (r for rectangles in _rectangles(q.shape[0], options) for r in rectangles):
            heads, queries, keys = rectangle.heads, rectangle.queries, rectangle.keys
            q_tile, grad_tile = flat_q[heads, queries], flat_grad[heads, queries]
            weights = _scores(flat_q, flat_k, bias, options, rectangle)
            weights.sub_(log_sum[heads, queries, None]).exp_()
            grad_scores = torch.bmm(grad_tile, flat_v[heads, keys].transpose(1, 2))
            dropped = weights
            if options.dropout is not None:
                keep = _keep_scale(options.dropout, options, rectangle, weights.dtype)
                dropped = weights * keep
                grad_scores.mul_(keep)
            grad_scores.sub_(delta[heads, queries]).mul_(weights)
            grad_v[heads, keys].baddbmm_(dropped.transpose(1, 2), grad_tile)
            grad_q[heads, queries].baddbmm_(grad_scores, flat_k[heads, keys], alpha=options.scale)
            grad_k[heads, keys].baddbmm_(grad_scores.transpose(1, 2), q_tile, alpha=options.scale)
            if grad_bias is not None:
                head_grads = grad_scores.unflatten(0, (-1, options.num_heads)).sum(0)
                add_bias_tile_gradient(grad_bias, head_grads, q.shape[2], queries, keys)
        grad_q, grad_k, grad_v = (
            grad.view(x.shape).to(x.dtype) for grad, x in ((grad_q, q), (grad_k, k), (grad_v, v))
        )
        return grad_q, grad_k, grad_v, grad_bias, None


def _rectangles(batch_size: int, options: _Options) -> Iterator[list[_Rectangle]]:
    """For each tile, the rectangles that its keys are cut into."""
    plan = options.mask.derived("tiles", plan_tiles)
    for row, tiles in enumerate(plan):
        rows = slice(row, row + 1) if len(plan) > 1 else slice(0, batch_size)
        heads = slice(rows.start * options.num_heads, rows.stop * options.num_heads)
        for tile in tiles:
            edges = [*range(tile.key_first, tile.key_last, _MAX_KEYS), tile.key_last]
            yield [_Rectangle(tile, rows, heads, slice(first, last)) for first, last in pairwise(edges)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    options: _Options,
    rectangles: list[_Rectangle],
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one tile, joined from the softmaxes over each of its rectangles."""
    parts = [_attend_rectangle(q, k, v, bias, options, rectangle) for rectangle in rectangles]
    out, log_sum = parts[0]
    for next_out, next_log_sum in parts[1:]:
        joint = torch.logaddexp(log_sum, next_log_sum)
        out = out * torch.exp(log_sum - joint) + next_out * torch.exp(next_log_sum - joint)
        log_sum = joint
    return out, log_sum.squeeze(-1)


def _attend_rectangle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    options: _Options,
    rectangle: _Rectangle,
) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, bias, options, rectangle)
    weights = scores.softmax(-1)
    # The largest weight is exp(maximum - log_sum): one pass, where a log-sum-exp from scratch takes four.
    log_sum = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    if options.dropout is not None:
        weights.mul_(_keep_scale(options.dropout, options, rectangle, weights.dtype))
    return torch.bmm(weights, v[rectangle.heads, rectangle.keys]), log_sum


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, options: _Options, rectangle: _Rectangle) -> Tensor:
    """Scaled, biased and masked scores of a rectangle, `[heads, queries, keys]`.

    Hidden pairs get the lowest finite number: a row that sees none of these keys then has a log-sum-exp that
    weighs nothing beside its other rectangles, where minus infinity would give NaN.
    """
    heads, queries, keys, tile = rectangle.heads, rectangle.queries, rectangle.keys, rectangle.tile
    scores = torch.bmm(q[heads, queries] * options.scale, k[heads, keys].transpose(1, 2))
    if bias is not None:
        by_head = scores.unflatten(0, (-1, options.num_heads))
        by_head += bias_tile(bias, options.mask.num_queries, queries, keys)
    row = min(rectangle.rows.start, options.mask.batch_size - 1)
    start, end = options.mask.start[row, queries, None], options.mask.end[row, queries, None]
    for first, last in ((tile.key_first, tile.full_first), (tile.full_last, tile.key_last)):
        first, last = max(first, keys.start), min(last, keys.stop)
        if first < last:
            key = torch.arange(first, last, device=scores.device)
            hidden = (key < start) | (key >= end)
            scores[..., first - keys.start : last - keys.start].masked_fill_(
                hidden, torch.finfo(scores.dtype).min
            )
    return scores


def _keep_scale(
    dropout: DropoutPattern, options: _Options, rectangle: _Rectangle, dtype: torch.dtype
) -> Tensor:
    """Factors of the weights, 0 or 1 / (1 - rate), `[heads, queries, keys]`."""
    keep = dropout.keep_tile(rectangle.rows, options.num_heads, rectangle.queries, rectangle.keys)
    return keep.flatten(0, 1).to(dtype) * dropout.keep_scale


def _flatten(x: Tensor) -> Tensor:
    """`[B, H, S, D]` as `[B * H, S, D]` in the dtype of the scores."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
