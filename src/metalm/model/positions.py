"""Positions of the decoder, computed where they are used: no table, no longest length.

Positions restart at each document of a packed row, so every position's values are computed from its own
number and not from its place in the row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metalm.config import RopeScalingConfig


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


def rotary_angles(
    positions: Tensor, head_size: int, base: float, scaling: RopeScalingConfig | None = None
) -> Tensor:
    """Angles by which queries and keys are turned: p / base^(2i/K) (Su et al., 2021).

    Dimension i is paired with i + K/2, so the K/2 angles stand twice, end to end.

    Args:
        positions: [...] integers.
        head_size: K, even.
        base: of the wavelengths.
        scaling: Llama 3's stretch of the long wavelengths.

    Returns:
        [..., K] float32.
    """
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    frequencies = 1.0 / base**exponents
    if scaling is not None:
        frequencies = _stretch(frequencies, scaling)
    angles = positions.to(torch.float32)[..., None] * frequencies
    return torch.cat((angles, angles), dim=-1)


def _stretch(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Short wavelengths stay, long ones are stretched, those between blend."""
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotation(angles: Tensor) -> Tensor:
    """What `metalm.kernels.turn` takes: cosines and sines [2, T, K / 2] of `rotary_angles` [T, K]."""
    half = angles[..., : angles.shape[-1] // 2]
    return torch.stack((half.cos(), half.sin()))
