"""Attention over interval masks by the Triton kernels, as one differentiable function."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from metalm.kernels.dropout import DropoutPattern, drop_threshold
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.triton_backward import key_gradient_kernel, query_gradient_kernel
from metalm.kernels.triton_forward import forward_kernel

_MAX_HEAD_SIZE = 256


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    bias: Tensor | None,
    scale: float,
    dropout: DropoutPattern | None,
) -> Tensor:
    """Arguments as those of `tiled_attention`; never waits for the device.

    Raises:
        ValueError: the dtype or head size is not supported, or there is neither CUDA nor the interpreter.
    """
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or q.shape[-1] > _MAX_HEAD_SIZE:
        raise ValueError(
            f"the triton backend takes float32, float16 and bfloat16 and head sizes up to {_MAX_HEAD_SIZE}, "
            f"got {q.dtype} and {q.shape[-1]}"
        )
    if q.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"the triton backend needs CUDA or TRITON_INTERPRET=1, got tensors on {q.device}")
    dtype = q.dtype
    if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as integers, and truncates where hardware rounds.
        q, k, v = q.float(), k.float(), v.float()
    out: Tensor = _TritonAttention.apply(q, k, v, bias, mask, scale, dropout)
    return out.to(dtype)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: IntervalMask,
        scale: float,
        dropout: DropoutPattern | None,
    ) -> Tensor:
        q, k, v = (_rows_contiguous(x) for x in (q, k, v))
        batch_size, num_heads, num_queries, _ = q.shape
        # Laid out as q, so that a caller's own permutation of the output is free.
        out = torch.empty_like(q)
        log_sum = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        # The kernels add the bias before they scale.
        raw_bias = None if bias is None else (bias.float() / scale).contiguous()
        start, end, stride_mask = _intervals(mask)

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(num_queries, meta["BLOCK_Q"]), batch_size * num_heads

        with torch.cuda.device_of(q):
            forward_kernel[grid](
                q, k, v, out, log_sum, start, end, _or_unused(raw_bias, q), *_pattern(dropout, q),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], stride_mask,
                num_heads, num_heads // k.shape[1], num_queries, k.shape[2],
                *_scalars(scale, dropout, q, k), **_meta(q, bias, dropout),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, bias, raw_bias, out, log_sum)
        ctx.mask, ctx.scale, ctx.dropout = mask, scale, dropout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, raw_bias, out, log_sum = ctx.saved_tensors
        grad = _rows_contiguous(grads[0])
        batch_size, num_heads, num_queries, _ = q.shape
        num_key_heads, num_keys = k.shape[1:3]
        groups = num_heads // num_key_heads
        delta = torch.empty_like(log_sum)
        grad_q = torch.empty_like(out)
        grad_k = torch.empty_like(k)
        grad_v = torch.empty_like(grad_k)
        grad_bias = torch.zeros_like(raw_bias) if raw_bias is not None else log_sum.new_zeros(1)
        scalars, meta = _scalars(ctx.scale, ctx.dropout, q, k), _meta(q, bias, ctx.dropout)
        raw_bias, pattern = _or_unused(raw_bias, q), _pattern(ctx.dropout, q)

        def query_grid(meta: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(num_queries, meta["BLOCK_Q"]), batch_size * num_heads

        def key_grid(meta: dict[str, int]) -> tuple[int, int]:
            return triton.cdiv(num_keys, meta["BLOCK_K"]), batch_size * num_key_heads

        with torch.cuda.device_of(q):
            start, end, stride_mask = _intervals(ctx.mask)
            query_gradient_kernel[query_grid](
                q, k, v, out, grad, log_sum, delta, grad_q, start, end, raw_bias, grad_bias, *pattern,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *grad.stride()[:3],
                stride_mask, num_heads, groups, num_queries, num_keys, ctx.scale, *scalars, **meta,
            )  # fmt: skip
            start, end, stride_mask = _intervals(ctx.mask.transpose())
            key_gradient_kernel[key_grid](
                q, k, v, grad, log_sum, delta, grad_k, grad_v, start, end, raw_bias, *pattern,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *grad_k.stride()[:3],
                stride_mask, num_key_heads, num_queries, num_keys, ctx.scale, *scalars, **meta, GROUPS=groups,
            )  # fmt: skip
        return grad_q, grad_k, grad_v, None if bias is None else grad_bias.to(bias.dtype), *(None,) * 3


def _scalars(scale: float, dropout: DropoutPattern | None, q: Tensor, k: Tensor) -> tuple[float, ...]:
    """The kernels' arguments from `scale_log2` to `length_class`."""
    # Kernels are tuned once per power of two of the length, whatever the mask.
    length_class = triton.next_power_of_2(max(q.shape[2], k.shape[2]))
    drop = (
        (0, 1.0, 0)
        if dropout is None
        else (drop_threshold(dropout.rate), dropout.keep_scale, dropout.head_offset)
    )
    return scale / math.log(2.0), *drop, length_class


def _meta(q: Tensor, bias: Tensor | None, dropout: DropoutPattern | None) -> dict[str, Any]:
    head_size = q.shape[-1]
    return {
        "HEAD_SIZE": head_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "HAS_BIAS": bias is not None,
        "HAS_DROPOUT": dropout is not None,
        # Contraction of multiply and add, which Triton is about to turn off by default.
        "enable_fp_fusion": True,
        # TF32 would lose thirteen bits of a float32 product.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _intervals(mask: IntervalMask) -> tuple[Tensor, Tensor, int]:
    """Start, end and their stride between batch rows, 0 where one row holds for all."""
    return (
        mask.start.contiguous(),
        mask.end.contiguous(),
        mask.num_queries if mask.batch_size > 1 else 0,
    )


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pattern(dropout: DropoutPattern | None, placeholder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds and positions, or pointers that are never read."""
    if dropout is None:
        return placeholder, placeholder, placeholder
    return dropout.seeds, dropout.query_positions, dropout.key_positions


def _or_unused(x: Tensor | None, placeholder: Tensor) -> Tensor:
    """A pointer for an argument that the kernel, compiled without the feature, never reads."""
    return placeholder if x is None else x
