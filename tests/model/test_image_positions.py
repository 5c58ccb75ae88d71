from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metalm.errors import CheckpointError
from metalm.model.image_positions import fit_image_positions, fit_positions


def cubic_weight(distance: float) -> float:
    """Keys' cubic kernel with a = -0.75, which torch's bicubic interpolation uses."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def by_hand(grid: Tensor, new: int) -> Tensor:
    """[old, old, D] to [new, new, D], one output at a time."""
    old = len(grid)
    out = torch.zeros(new, new, grid.shape[-1], dtype=torch.float64)
    for row in range(new):
        for column in range(new):
            y, x = ((at + 0.5) * old / new - 0.5 for at in (row, column))
            for i in range(int(y // 1) - 1, int(y // 1) + 3):
                for j in range(int(x // 1) - 1, int(x // 1) + 3):
                    weight = cubic_weight(y - i) * cubic_weight(x - j)
                    out[row, column] += weight * grid[min(max(i, 0), old - 1), min(max(j, 0), old - 1)]
    return out


def test_fits_the_grid_of_384_pixels_as_the_formula_and_as_torch_do() -> None:
    table = torch.randn(14 * 14, 3, generator=torch.Generator().manual_seed(1))
    found = fit_image_positions(table, 24 * 24)
    assert found.shape == (576, 3)
    expected = by_hand(table.view(14, 14, 3).double(), 24).view(576, 3)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    upsample = nn.Upsample(size=24, mode="bicubic")
    for channel in range(3):
        torch_says = upsample(table[:, channel].view(1, 1, 14, 14))[0, 0]
        torch.testing.assert_close(found[:, channel].view(24, 24), torch_says)


def test_the_same_grid_is_left_alone() -> None:
    table = torch.randn(9, 2)
    assert fit_image_positions(table, 9) is table


@pytest.mark.parametrize(("old", "new"), [(9, 8), (197, 576)])
def test_a_table_that_is_no_square_is_refused(old: int, new: int) -> None:
    with pytest.raises(CheckpointError, match=f"{old} patches cannot be fitted to {new}"):
        fit_image_positions(torch.zeros(old, 2), new)


@pytest.mark.parametrize(("rows", "wanted"), [(1 + 9, 1 + 25), (9, 25), (2 + 9, 2 + 4)])
def test_rows_before_the_patches_stay(rows: int, wanted: int) -> None:
    """As of ViT's class token, and DeiT's two."""
    table = torch.randn(1, rows, 3)
    before = 0 if rows == 9 else rows - 9
    found = fit_positions(table, (1, wanted, 3))
    assert torch.equal(found[:, :before], table[:, :before])
    patches = fit_image_positions(table[0, before:], wanted - before)
    assert torch.equal(found[0, before:], patches)
