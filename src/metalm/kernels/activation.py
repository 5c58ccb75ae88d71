"""What stands between a feed-forward's two products: a bias and an activation, with or without a gate.

On CUDA one pass over memory in each direction, which also sums the bias's gradient; elsewhere PyTorch's own
operations.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from metalm.kernels.elementwise import Backend, choose_backend

ActivationKind = Literal["gelu", "gelu_tanh", "silu"]


def activate(
    inner: Tensor,
    kind: ActivationKind,
    *,
    is_gated: bool = False,
    bias: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """`f(inner + bias)`, or `f(gate) * value` of its two halves; differentiable in both.

    Args:
        inner: floating `[..., F]`; `[..., 2 F]` with a gate, which is the first half.
        kind: of f.
        is_gated: whether there is a gate.
        bias: of inner's last dimension.
        backend: forces "triton" (CUDA, or Triton's interpreter) or "torch"; see `choose_backend`.

    Returns:
        `[..., F]`.
    """
    if (backend or choose_backend(inner)) == "triton":
        from metalm.kernels.triton_activation import triton_activate

        return triton_activate(inner, bias, kind, is_gated=is_gated)
    if bias is not None:
        inner = inner + bias
    if not is_gated:
        return _apply(inner, kind)
    gate, value = inner.chunk(2, dim=-1)
    return _apply(gate, kind) * value


def _apply(inner: Tensor, kind: ActivationKind) -> Tensor:
    if kind == "silu":
        return functional.silu(inner)
    return functional.gelu(inner, approximate="tanh" if kind == "gelu_tanh" else "none")
