"""The reference: attention with the whole mask materialised, by plain autograd, in any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.kernels.dropout import DropoutPattern
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.relative_bias import bias_tile


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    bias: Tensor | None,
    scale: float,
    dropout: DropoutPattern | None,
) -> Tensor:
    """Arguments as those of `tiled_attention`. Computes in float32, or in float64 for float64 inputs.

    Memory is quadratic in the length.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (k, v))
    queries, keys = slice(0, q.shape[2]), slice(0, k.shape[2])
    scores = scale * q.to(dtype) @ wide_k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias_tile(bias.to(dtype), q.shape[2], queries, keys)
    visible = mask.to_dense()[:, None]
    sees_something = visible.any(-1, keepdim=True)
    # A row that sees nothing is computed as if it saw all, then zeroed: no NaN to leak into a gradient.
    weights = scores.masked_fill(~visible & sees_something, float("-inf")).softmax(-1)
    weights = weights.masked_fill(~sees_something, 0.0)
    if dropout is not None:
        kept = dropout.keep_tile(slice(0, q.shape[0]), q.shape[1], queries, keys)
        weights = weights * kept * dropout.keep_scale
    return (weights @ wide_v).to(q.dtype)
