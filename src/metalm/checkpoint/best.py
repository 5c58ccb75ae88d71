"""`checkpoints/best`: which checkpoint of a run is the best by a figure, for people and for pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from metalm.checkpoint.names import BEST_NAME, STEP_NAME, step_of
from metalm.regular_files import read_regular, replace_file


@dataclass(frozen=True)
class Best:
    """The content of the file, a value a line."""

    folder: str
    """`step_N`, beside the file."""
    figure: str
    value: float

    @property
    def step(self) -> int:
        """That it was saved at."""
        return step_of(Path(self.folder))


def write_best(checkpoints: Path, best: Best) -> None:
    """Name the best checkpoint; the file is replaced at once.

    Raises:
        OSError: it could not be written.
    """
    content = f"{best.folder}\n{best.figure}\n{best.value!r}\n"
    replace_file(checkpoints / BEST_NAME, content, forced=True)


def read_best(checkpoints: Path) -> Best | None:
    """What is named the best of a folder of checkpoints; None if nothing is, or the file is damaged."""
    try:
        folder, figure, value = read_regular(checkpoints / BEST_NAME).decode().splitlines()
        best = Best(folder, figure, float(value))
    except (OSError, ValueError):
        return None
    return best if STEP_NAME.fullmatch(folder) and math.isfinite(best.value) else None
