"""Bias and activation in Triton: one kernel a direction; the backward sums the bias's gradient on its way."""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metalm.kernels.activation import ActivationKind

BLOCK = 1024
NUM_WARPS = 4
NUM_ROW_GROUPS = 128
"""Of a backward's grid: with eight blocks of columns, all that a large GPU runs at once."""

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_TAU = tl.constexpr(0.3989422804014327)
_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _normal(x):
    """The normal distribution below x, and exp(-x^2 / 2), of which both directions are made.

    By Abramowitz and Stegun's 7.1.26, off by 8e-8 at most: the libraries' error function takes twice as many
    instructions, and a GPU more time for them than for the bytes.
    """
    decay = tl.exp2(x * x * _HALF_LOG2_E)
    t = 1.0 / (tl.abs(x) * (_SQRT_HALF * 0.3275911) + 1.0)
    series = (((t * 1.061405429 - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    beyond = series * t * decay * 0.5
    return tl.where(x > 0.0, 1.0 - beyond, beyond), decay


@triton.jit
def _share(x, KIND: tl.constexpr):
    """The activation of x over x: of GELU the normal distribution, of SiLU and GELU by tanh a sigmoid."""
    if KIND == "gelu":
        share, _ = _normal(x)
        return share
    if KIND == "gelu_tanh":
        return tl.sigmoid(x * _SQRT_8_OVER_PI * (x * x * _CUBIC + 1.0))
    return tl.sigmoid(x)


@triton.jit
def _share_and_slope(x, KIND: tl.constexpr):
    """The same, and the activation's derivative."""
    if KIND == "gelu":
        share, decay = _normal(x)
        return share, share + x * decay * _INVERSE_SQRT_TAU
    share = _share(x, KIND)
    if KIND == "gelu_tanh":
        inner_slope = (x * x * _CUBIC * 3.0 + 1.0) * _SQRT_8_OVER_PI
        return share, share + x * share * (1.0 - share) * inner_slope
    return share, share + x * share * (1.0 - share)


@triton.jit
def _load(ptr, bias_ptr, at, columns, inside):
    value = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def activation_kernel(
    inner_ptr, inner_bias_ptr, out_ptr, width, KIND: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (rows, blocks of a row). The width is the output's."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if IS_GATED:
        gate = _load(inner_ptr, inner_bias_ptr, 2 * row * width + columns, columns, inside)
        value = _load(inner_ptr, inner_bias_ptr, (2 * row + 1) * width + columns, width + columns, inside)
        out = gate * _share(gate, KIND) * value
    else:
        inner = _load(inner_ptr, inner_bias_ptr, row * width + columns, columns, inside)
        out = inner * _share(inner, KIND)
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_gradient_kernel(
    grad_ptr,
    inner_ptr,
    inner_bias_ptr,
    grad_inner_ptr,
    sums_ptr,
    num_rows,
    width,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (groups of rows, blocks of a row); a group leaves a row of sums as wide as the bias."""
    group = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    of_first = tl.zeros([BLOCK], tl.float32)
    of_second = tl.zeros([BLOCK], tl.float32)
    element = grad_inner_ptr.dtype.element_ty
    wide = width.to(tl.int64)
    for row in tl.range(group, num_rows, tl.num_programs(0), num_stages=2):
        grad = tl.load(grad_ptr + row * wide + columns, mask=inside, other=0.0).to(tl.float32)
        if IS_GATED:
            first, second = 2 * row * wide + columns, (2 * row + 1) * wide + columns
            gate = _load(inner_ptr, inner_bias_ptr, first, columns, inside)
            value = _load(inner_ptr, inner_bias_ptr, second, width + columns, inside)
            share, slope = _share_and_slope(gate, KIND)
            of_value = grad * gate * share
            of_gate = grad * value * slope
            tl.store(grad_inner_ptr + first, of_gate.to(element), mask=inside)
            tl.store(grad_inner_ptr + second, of_value.to(element), mask=inside)
            of_first += of_gate
            of_second += of_value
        else:
            at = row * wide + columns
            inner = _load(inner_ptr, inner_bias_ptr, at, columns, inside)
            _, slope = _share_and_slope(inner, KIND)
            of_inner = grad * slope
            tl.store(grad_inner_ptr + at, of_inner.to(element), mask=inside)
            of_first += of_inner
    if NEEDS_SUMS:
        if IS_GATED:
            tl.store(sums_ptr + 2 * group * width + columns, of_first, mask=inside)
            tl.store(sums_ptr + (2 * group + 1) * width + columns, of_second, mask=inside)
        else:
            tl.store(sums_ptr + group * width + columns, of_first, mask=inside)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, bias: Tensor | None, kind: ActivationKind, is_gated: bool) -> Tensor:
        inner = inner.contiguous()
        width = inner.shape[-1] // (2 if is_gated else 1)
        out = inner.new_empty(*inner.shape[:-1], width)
        num_rows = out.numel() // width
        if num_rows:
            with torch.cuda.device_of(inner):
                activation_kernel[(num_rows, triton.cdiv(width, BLOCK))](
                    inner, bias, out, width, KIND=kind, IS_GATED=is_gated, BLOCK=BLOCK, num_warps=NUM_WARPS
                )
        ctx.save_for_backward(inner, bias)
        ctx.options = (kind, is_gated)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, bias = ctx.saved_tensors
        kind, is_gated = ctx.options
        grad, grad_inner = grads[0].contiguous(), torch.empty_like(inner)
        width = grad.shape[-1]
        num_rows = grad.numel() // width
        num_groups, needs_sums = min(NUM_ROW_GROUPS, num_rows), ctx.needs_input_grad[1]
        sums = inner.new_empty(num_groups if needs_sums else 0, inner.shape[-1], dtype=torch.float32)
        if num_rows:
            with torch.cuda.device_of(inner):
                activation_gradient_kernel[(num_groups, triton.cdiv(width, BLOCK))](
                    grad,
                    inner,
                    bias,
                    grad_inner,
                    sums,
                    num_rows,
                    width,
                    KIND=kind,
                    IS_GATED=is_gated,
                    NEEDS_SUMS=needs_sums,
                    BLOCK=BLOCK,
                    num_warps=NUM_WARPS,
                )
        return grad_inner, sums.sum(0).to(bias.dtype) if needs_sums else None, None, None


def triton_activate(inner: Tensor, bias: Tensor | None, kind: ActivationKind, *, is_gated: bool) -> Tensor:
    """`[..., F]`; see `activate`."""
    out: Tensor = _Activate.apply(inner, bias, kind, is_gated)
    return out
