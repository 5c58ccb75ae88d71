"""A residual sum and its norm in one: bias, dropout, weighted residual, layer norm or RMS norm.

On CUDA one pass over memory in each direction, which also sums the gradients of the norm's parameters and of
the branch's bias; elsewhere PyTorch's own operations. A vector's values depend on nothing but the vector.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from metalm.kernels.dropout import HiddenPattern
from metalm.kernels.elementwise import Backend, choose_backend

NormKind = Literal["layer_norm", "rms_norm"]


class Normed(NamedTuple):
    """What a residual sum gives; each is `[..., D]`."""

    normed: Tensor
    again: Tensor
    """The same values, for a second use: the norm's own pass adds the gradients of both up."""
    total: Tensor
    """The sum before the norm."""


def residual_norm(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: NormKind,
    eps: float,
    residual_scale: float = 1.0,
    branch_bias: Tensor | None = None,
    dropout: HiddenPattern | None = None,
    backend: Backend | None = None,
) -> Normed:
    """`norm(dropout(branch + branch_bias) + residual_scale * residual)`, differentiable in all tensors.

    Args:
        branch: floating `[..., D]`, what a sublayer gives; None to norm the residual alone.
        residual: `[..., D]` of the branch's dtype.
        weight: `[D]`.
        bias: `[D]` of a layer norm.
        kind: of the norm.
        eps: added to the variance, or to the mean square.
        residual_scale: weight of the residual; 1 without a branch.
        branch_bias: `[D]`.
        dropout: what of the branch is dropped.
        backend: forces "triton" (CUDA, or Triton's interpreter) or "torch"; see `choose_backend`.
    """
    if (backend or choose_backend(residual)) == "triton":
        from metalm.kernels.triton_norm import Options, triton_residual_norm

        options = Options(kind == "layer_norm", eps, residual_scale, dropout)
        return Normed(*triton_residual_norm(branch, branch_bias, residual, weight, bias, options))
    total = residual_sum(
        branch, residual, residual_scale=residual_scale, branch_bias=branch_bias, dropout=dropout
    )
    if kind == "layer_norm":
        normed = functional.layer_norm(total, weight.shape, weight, bias, eps)
    else:
        normed = functional.rms_norm(total, weight.shape, weight, eps)
    return Normed(normed, normed, total)


def residual_sum(
    branch: Tensor | None,
    residual: Tensor,
    *,
    residual_scale: float = 1.0,
    branch_bias: Tensor | None = None,
    dropout: HiddenPattern | None = None,
) -> Tensor:
    """The sum alone, by PyTorch's operations; see `residual_norm`."""
    if branch is None:
        return residual
    if branch_bias is not None:
        branch = branch + branch_bias
    if dropout is not None:
        branch = dropout.drop(branch)
    return torch.add(branch, residual, alpha=residual_scale)
