"""The check of a backend that is not ours before its first use: small values against the dense reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from metalm.kernels.dense import dense_attention
from metalm.kernels.interval_mask import IntervalMask

# Of the norm of the difference, by that of the reference: bfloat16 operands give 2e-3 to 5e-3.
_TOLERANCE = 2e-2

Attention = Callable[[Tensor, Tensor, Tensor, IntervalMask, float], Tensor]
"""Of q, k, v `[B, H, S, D]`, mask and scale."""


def problem_of(
    attention: Attention, mask: IntervalMask, *, dtype: torch.dtype, head_size: int, is_grouped: bool
) -> str | None:
    """What is wrong with values and gradients of two rows under a mask, or None. Waits for the device.

    Args:
        attention: the backend.
        mask: over its own queries, small, on the device to check.
        dtype: of the operands.
        head_size: of the operands.
        is_grouped: two heads of queries share one of keys.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, mask.num_queries, head_size) for heads in (4, 2 if is_grouped else 4)]
    drawn = [torch.randn(shapes[which], generator=generator) for which in (0, 1, 1, 0)]
    q, k, v, grad = (x.to(mask.device, dtype) for x in drawn)
    scale = head_size**-0.5

    def reference(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float) -> Tensor:
        return dense_attention(q, k, v, mask, None, scale, None)

    def results(attention: Attention, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention(inputs[0], inputs[1], inputs[2], mask, scale)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    try:
        with torch.enable_grad(), torch.autocast(mask.device.type, enabled=False):
            found, expected = results(attention, dtype), results(reference, torch.float32)
    except Exception as error:  # whatever another package raises: the caller logs it and goes on without
        return f"failed: {next(iter(str(error).splitlines()), type(error).__name__)}"
    errors = [
        float((one.float() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)
    ]
    worst = max(errors, key=lambda error: (math.isnan(error), error))
    return None if worst <= _TOLERANCE else f"differs from the reference by {worst:.1e} of its norm"
