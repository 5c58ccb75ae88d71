"""Which checkpoint of a run is the best by a held-out figure, as the run goes on, is killed and resumed.

A checkpoint counts once it is published and its figure measured, whichever comes last. Both are found again
on disk, so a run that was killed in between settles the matter when it starts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from metalm.checkpoint.best import Best, read_best, write_best
from metalm.checkpoint.names import CHECKPOINTS_NAME, list_checkpoints, step_of
from metalm.config import KeepBestConfig
from metalm.errors import ConfigError
from metalm.run_metrics import read_metrics

logger = logging.getLogger(__name__)

PREFIX = "held_out/"


class BestCheckpoint:
    """Keeps the file `checkpoints/best` of a run: the first rank does, the others only check the figure."""

    def __init__(self, run_folder: Path, config: KeepBestConfig, *, last_step: int, is_first: bool) -> None:
        """Take up what the run has measured before.

        Args:
            run_folder: of the run.
            config: the figure.
            last_step: that the run goes on from; what was measured later is of weights that are given up.
            is_first: whether this is the rank that writes.
        """
        self._run_folder, self._checkpoints = run_folder, run_folder / CHECKPOINTS_NAME
        self._config, self._is_first = config, is_first
        self._values: dict[int, float] = {}
        self.go_back(last_step)

    def go_back(self, last_step: int) -> None:
        """Forget what was measured after a step, and know what is on disk of the steps before."""
        self._values = {}
        if not self._is_first:
            return
        named, figure = read_best(self._checkpoints), self._config.figure
        if named is not None and named.figure == figure:
            self._values[named.step] = named.value
        self._values |= {
            entry["step"]: entry[figure] for entry in read_metrics(self._run_folder) if figure in entry
        }
        self._values = {step: value for step, value in self._values.items() if step <= last_step}
        self.settle()

    def measured(self, step: int, losses: Mapping[str, float]) -> None:
        """Note the held-out losses of a step, by their names without `held_out/`.

        Raises:
            ConfigError: the figure is not among them; on all ranks alike.
        """
        name = self._config.figure.removeprefix(PREFIX)
        if name not in losses:
            known = ", ".join(PREFIX + other for other in losses)
            raise ConfigError(
                f"checkpoint.keep_best.figure = {self._config.figure!r} is not measured; known: {known}"
            )
        self._values[step] = losses[name]
        self.settle()

    def settle(self) -> None:
        """Name the best of those that are published and measured. Of equal ones the first."""
        if not self._is_first:
            return
        sign = 1 if self._config.direction == "lowest" else -1
        found = [
            (sign * value, folder.name)
            for folder in list_checkpoints(self._checkpoints)
            if math.isfinite(value := self._values.get(step_of(folder), math.nan))
        ]
        if not found:
            return
        value, name = min(found)
        best = Best(name, self._config.figure, sign * value)
        if best == read_best(self._checkpoints):
            return
        try:
            write_best(self._checkpoints, best)
        except OSError as error:
            logger.warning("%s could not be named the best checkpoint: %s", name, error)
