"""Rotary positions applied to queries and keys: on CUDA in one pass, elsewhere by PyTorch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from metalm.kernels.elementwise import Backend, choose_backend


def turn(heads: Tensor, rotation: Tensor, backend: Backend | None = None) -> Tensor:
    """Turn the first R dimensions of each head, dimension i with i + R / 2; differentiable in the heads.

    Args:
        heads: floating `[T, H, K]`, any strides.
        rotation: float32 `[2, T, R / 2]`, contiguous: cosines and sines of each vector's angles.
        backend: forces "triton" (CUDA, or Triton's interpreter) or "torch"; see `choose_backend`.

    Returns:
        `[T, H, K]`.
    """
    if (backend or choose_backend(heads)) == "triton":
        from metalm.kernels.triton_rotary import triton_turn

        return triton_turn(heads, rotation)
    cosines, sines = rotation.to(heads.dtype)[:, :, None]
    size = rotation.shape[-1]
    first, second, kept = heads[..., :size], heads[..., size : 2 * size], heads[..., 2 * size :]
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat((*turned, kept) if kept.shape[-1] else turned, dim=-1)
