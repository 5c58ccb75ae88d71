"""Requests to stop: a signal, the stop file in the run folder, or the time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import types
from pathlib import Path

from metalm.run_folder import ANSWERED_STOP_NAME, LOGS_NAME, STOP_NAME

_SAME_REQUEST_S = 5.0


def _since_boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _process_began_s() -> float:
    """When this process began, as `_since_boot_s` tells the time: see proc_pid_stat(5), `starttime`."""
    behind_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(behind_name[19]) / os.sysconf("SC_CLK_TCK")


class StopRequest:
    """Whether somebody asked this run to save and end.

    SIGTERM, SIGINT, SIGUSR2 and, unless it is ignored as under `nohup`, SIGHUP to any rank count, the file
    `stop` in the run folder, which one rank looks for and which reaches ranks whose launcher swallows
    signals, and the time limit of the config. A second signal ends the process at once. Only a SIGTERM soon
    after the first does not: Slurm signals every process of a job, and torchrun then signals its workers
    again.
    """

    def __init__(
        self, run_folder: Path, time_limit_minutes: float | None = None, *, watches_file: bool = True
    ) -> None:
        """Listen from now on.

        Args:
            run_folder: of the run.
            time_limit_minutes: age of this process; None: as long as it takes.
            watches_file: whether this rank is the one that looks for the stop file.
        """
        self._watches_file = watches_file
        self._file = run_folder / STOP_NAME
        self._answered = run_folder / LOGS_NAME / ANSWERED_STOP_NAME
        self._limit_minutes = time_limit_minutes
        self._began_s = _process_began_s()
        self._signalled_at: float | None = None
        self._signal = ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def is_asked(self) -> bool:
        """Whether this rank has been asked."""
        return (
            self._is_late() or self._signalled_at is not None or (self._watches_file and self._file.exists())
        )

    def reason(self) -> str | None:
        """Who asked this rank; None: nobody, another rank was asked."""
        if self._watches_file:
            with contextlib.suppress(OSError):
                return f"the stop file ({self._file.read_text().strip() or 'it names nobody'})"
        if self._signalled_at is not None:
            return self._signal
        return f"training.time_limit_minutes = {self._limit_minutes:g}" if self._is_late() else None

    def _is_late(self) -> bool:
        return self._limit_minutes is not None and _since_boot_s() - self._began_s > 60 * self._limit_minutes

    def clear(self) -> None:
        """Move the stop file to the logs, so that the run can be started again. One rank calls it."""
        with contextlib.suppress(FileNotFoundError):  # a signal or the time limit has asked
            self._file.replace(self._answered)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at, self._signal = now, signal.Signals(number).name
        elif now - self._signalled_at > _SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
