"""Residual sum and norm in Triton: one kernel a direction, a program per row forward, some rows backward.

The sum is stored as it is rounded and normed as it is stored, so that the backward, which reads it, sees what
the forward saw. Parameters' gradients are summed by a fixed number of programs, then over the programs.
"""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metalm.kernels.dropout import HiddenPattern
from metalm.kernels.triton_hidden_dropout import is_kept

NUM_PROGRAMS = 512
"""Of a backward: what a large GPU runs at once, and the same on all, for the same sums."""


@triton.jit(do_not_specialize=["threshold", "site"])
def residual_norm_kernel(
    branch_ptr,
    branch_bias_ptr,
    residual_ptr,
    weight_ptr,
    norm_bias_ptr,
    seeds_ptr,
    positions_ptr,
    normed_ptr,
    total_ptr,
    mean_ptr,
    inverse_ptr,
    width,
    residual_scale,
    eps,
    threshold,
    keep_scale,
    site,
    IS_CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows. What has no pointer takes no part."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    total = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if branch_bias_ptr is not None:
            branch += tl.load(branch_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if seeds_ptr is not None:
            kept = is_kept(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0, site, threshold, BLOCK)
            branch = tl.where(kept, branch * keep_scale, 0.0)
        rounded = (branch + residual_scale * total).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=inside)
        total = rounded.to(tl.float32)
    if IS_CENTRED:
        mean = tl.sum(total, 0) / width
        tl.store(mean_ptr + row, mean)
        total = tl.where(inside, total - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(total * total, 0) / width + eps)
    tl.store(inverse_ptr + row, inverse)
    normed = total * inverse * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        normed += tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold", "site"])
def residual_norm_gradient_kernel(
    grad_ptr,
    grad_again_ptr,
    grad_total_ptr,
    total_ptr,
    weight_ptr,
    seeds_ptr,
    positions_ptr,
    mean_ptr,
    inverse_ptr,
    grad_branch_ptr,
    grad_residual_ptr,
    sums_ptr,
    num_rows,
    width,
    residual_scale,
    threshold,
    keep_scale,
    site,
    IS_CENTRED: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: any number of programs; each leaves three rows of sums: of the weight, the bias, the branch's.

    Without a pointer for the branch, its gradient is the residual's.
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    of_branch = tl.zeros([BLOCK], tl.float32)
    wide = width.to(tl.int64)
    for row in tl.range(program, num_rows, num_programs, num_stages=2):
        at = row * wide + columns
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if grad_again_ptr is not None:
            grad += tl.load(grad_again_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row)
        if IS_CENTRED:
            normed -= tl.load(mean_ptr + row)
        normed = tl.where(inside, normed * inverse, 0.0)
        of_weight += grad * normed
        of_bias += grad
        grad *= weight
        found = grad - normed * (tl.sum(grad * normed, 0) / width)
        if IS_CENTRED:
            found -= tl.sum(grad, 0) / width
        found *= inverse
        if grad_total_ptr is not None:
            found += tl.load(grad_total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        element = grad_residual_ptr.dtype.element_ty
        tl.store(grad_residual_ptr + at, (found * residual_scale).to(element), mask=inside)
        if seeds_ptr is not None:
            kept = is_kept(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), 0, site, threshold, BLOCK)
            found = tl.where(kept, found * keep_scale, 0.0)
        if grad_branch_ptr is not None:
            tl.store(grad_branch_ptr + at, found.to(element), mask=inside)
        of_branch += found
    if NEEDS_SUMS:
        sums_ptr += program.to(tl.int64) * 3 * width + columns
        tl.store(sums_ptr, of_weight, mask=inside)
        tl.store(sums_ptr + width, of_bias, mask=inside)
        tl.store(sums_ptr + 2 * width, of_branch, mask=inside)


@dataclass(frozen=True, eq=False)
class Options:
    """Of a residual sum and norm; see `residual_norm`."""

    is_centred: bool
    eps: float
    residual_scale: float
    dropout: HiddenPattern | None

    def arguments(self, hidden: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[int | float, ...]]:
        """Seeds and positions of the vectors, and threshold, scale and site."""
        if self.dropout is None:
            return (None, None), (0, 1.0, 0)
        return self.dropout.of_vectors(hidden), self.dropout.scalars


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor | None,
        branch_bias: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        residual = residual.contiguous()
        width, num_rows = residual.shape[-1], residual.numel() // residual.shape[-1]
        normed = torch.empty_like(residual)
        total = residual.view_as(residual) if branch is None else torch.empty_like(residual)
        mean, inverse = torch.empty(2, num_rows, dtype=torch.float32, device=residual.device)
        pattern, scalars = options.arguments(residual)
        if num_rows:
            with torch.cuda.device_of(residual):
                residual_norm_kernel[(num_rows,)](
                    None if branch is None else branch.contiguous(),
                    branch_bias,
                    residual,
                    weight,
                    bias,
                    *pattern,
                    normed,
                    total,
                    mean,
                    inverse,
                    width,
                    options.residual_scale,
                    options.eps,
                    *scalars,
                    IS_CENTRED=options.is_centred,
                    **launch_sizes(width),
                )
        ctx.save_for_backward(total, weight, mean, inverse, *pattern)
        ctx.options = options
        return normed, normed.view_as(normed), total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, mean, inverse, *pattern = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad
        grad, again, of_total = (None if given is None else given.contiguous() for given in grads)
        if grad is None:
            grad, again = again, None
        if grad is None:
            grad = torch.zeros_like(total)
        width, num_rows = total.shape[-1], inverse.numel()
        grad_residual = torch.empty_like(total)
        is_apart = needs[0] and (options.residual_scale != 1.0 or options.dropout is not None)
        grad_branch = torch.empty_like(total) if is_apart else None
        needs_sums = needs[1] or needs[3] or needs[4]
        num_programs = min(NUM_PROGRAMS, num_rows)
        sums = total.new_empty(num_programs if needs_sums else 0, 3, width, dtype=torch.float32)
        _, scalars = options.arguments(total)
        if num_rows:
            with torch.cuda.device_of(total):
                residual_norm_gradient_kernel[(num_programs,)](
                    grad,
                    again,
                    of_total,
                    total,
                    weight,
                    *pattern,
                    mean,
                    inverse,
                    grad_branch,
                    grad_residual,
                    sums,
                    num_rows,
                    width,
                    options.residual_scale,
                    *scalars,
                    IS_CENTRED=options.is_centred,
                    NEEDS_SUMS=needs_sums,
                    **launch_sizes(width),
                )
        of_weight, of_bias, of_branch = sums.sum(0).to(weight.dtype) if needs_sums else (None, None, None)
        return (
            grad_branch if is_apart else grad_residual if needs[0] else None,
            of_branch if needs[1] else None,
            grad_residual if needs[2] else None,
            of_weight if needs[3] else None,
            of_bias if needs[4] else None,
            None,
        )


def launch_sizes(width: int) -> dict[str, int]:
    """A block holds a row, a thread eight elements of it, which bfloat16 loads at once."""
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def triton_residual_norm(
    branch: Tensor | None,
    branch_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed vectors, twice, and the sums; see `residual_norm`."""
    found: tuple[Tensor, Tensor, Tensor] = _ResidualNorm.apply(
        branch, branch_bias, residual, weight, bias, options
    )
    return found
