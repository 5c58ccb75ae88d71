"""Positions of image patches at another resolution than they were trained at (224 to 384 pixels)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from metalm.errors import CheckpointError

_MOST_ROWS_BEFORE_PATCHES = 2
"""Of a class token and the like, in models of transformers."""


def holds_positions(name: str) -> bool:
    """Whether a parameter, by its name, is an encoder's positions of patches: of ours or of transformers."""
    return name.endswith(
        ("image_positions.weight", ".position_embeddings", "embeddings.position_embedding.weight")
    )


def fit_positions(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Positions for another grid of patches; see `fit_image_positions`.

    Args:
        table: [rows, D] or [1, rows, D]: perhaps one row or two of their own, then a square grid.
        shape: that is wanted.

    Raises:
        CheckpointError: the rows of one of them are no square grid.
    """
    rows = table.reshape(-1, table.shape[-1])
    wanted = shape[-2]
    for first in range(_MOST_ROWS_BEFORE_PATCHES + 1):
        if _is_square(len(rows) - first) and _is_square(wanted - first):
            fitted = fit_image_positions(rows[first:], wanted - first)
            return torch.cat((rows[:first], fitted)).reshape(shape)
    return fit_image_positions(rows, wanted).reshape(shape)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def fit_image_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Position vectors for a finer or coarser square grid of patches, by bicubic interpolation.

    The way of BEiT and ViT: the grid is taken as an image of D channels and resized with its corners
    kept at the corners of the picture (`align_corners=False`).

    Args:
        positions: [P, D], an encoder's `image_positions.weight`; P a square, rows of the grid one after
            another.
        num_patches: of the grid that is wanted, a square.

    Returns:
        [num_patches, D] in the dtype of `positions`; `positions` itself where the grid is the same.

    Raises:
        CheckpointError: one of the numbers is not a square.
    """
    old, new = math.isqrt(len(positions)), math.isqrt(num_patches)
    if old**2 != len(positions) or new**2 != num_patches:
        raise CheckpointError(
            f"image positions of {len(positions)} patches cannot be fitted to {num_patches}: "
            "both must be square grids"
        )
    if old == new:
        return positions
    grid = positions.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    fitted = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return fitted.permute(0, 2, 3, 1).reshape(num_patches, -1).to(positions.dtype)
