"""TensorBoard: curves, the page for operators, the run's key values, pictures, clips and texts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from metalm.config import RunConfig
from metalm.training.monitor.dashboard import write_key_values, write_page
from metalm.training.monitor.sink import About, Sink


class TensorBoard(Sink):
    """Writes event files to the run's `tensorboard` folder, all starts of a run as one curve."""

    def __init__(self, config: RunConfig, run_folder: Path) -> None:
        """Stand by; `begin` opens the first file."""
        self._config, self._folder = config, run_folder / "tensorboard"
        self._opened: SummaryWriter | None = None

    def begin(self, first_step: int) -> None:
        self.close()
        self._opened = SummaryWriter(self._folder, purge_step=first_step)
        write_page(self._writer)
        write_key_values(self._writer, self._config)

    def reopen(self) -> None:
        """A writer's thread dies of a full disk."""
        self._opened = SummaryWriter(self._folder)

    def write(self, step: int, figures: Mapping[str, float], about: About) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        quoted = "\n".join("    " + line for line in text.splitlines())  # it reads Markdown
        self._writer.add_text(name, quoted, step)
        self._writer.flush()

    def write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def write_audio(self, step: int, name: str, samples: np.ndarray, sampling_rate: int) -> None:
        self._writer.add_audio(name, torch.from_numpy(samples), step, sampling_rate)

    def close(self) -> None:
        writer, self._opened = self._opened, None
        if writer is not None:
            with suppress(OSError):  # it was logged when the figures were written
                writer.close()

    @property
    def _writer(self) -> SummaryWriter:
        assert self._opened is not None
        return self._opened
