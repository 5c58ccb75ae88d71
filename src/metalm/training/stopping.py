"""Requests to stop: a signal, or the stop file in the run folder."""

from __future__ import annotations

import signal
import types
from pathlib import Path

from metalm.run_folder import STOP_NAME


class StopRequest:
    """Whether somebody asked this run to save and end.

    SIGTERM, SIGINT and SIGUSR2 to any rank count, and so does the file `stop` in the run folder, which
    reaches ranks whose launcher swallows signals. A second SIGINT ends the process at once; a second
    SIGTERM does not, since Slurm signals every process of a job and torchrun then signals its workers again.
    """

    def __init__(self, run_folder: Path) -> None:
        self._file = run_folder / STOP_NAME
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._on_signal)

    def is_asked(self) -> bool:
        """Whether this rank has been asked."""
        return self._signalled or self._file.exists()

    def clear(self) -> None:
        """Take the stop file away, so that the run can be started again. One rank calls it."""
        self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signalled = True
