"""Sinusoidal positions of the decoder, computed where they are used: no table, no longest length."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_positions(positions: Tensor, hidden_size: int) -> Tensor:
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same (Vaswani et al., 2017, 3.5).

    Args:
        positions: [...] integers.
        hidden_size: D, even.

    Returns:
        [..., D] float32.
    """
    exponents = torch.arange(0, hidden_size, 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(exponents * (-math.log(10000.0) / hidden_size))
    angles = positions.to(torch.float32)[..., None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
