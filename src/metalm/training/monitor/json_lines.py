"""The figures of a run as JSON Lines in `logs/metrics.jsonl`: readable without torch or TensorBoard.

Every run has this file: `metalm status` reads it, and so does the run itself when it is started again.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from metalm.regular_files import replace_file
from metalm.run_metrics import metrics_path, read_metrics
from metalm.training.monitor.sink import About, Sink

RESTARTS = "run/restarts"
"""The figure that counts how often a run was started again."""


class JsonLines(Sink):
    """Appends to the metrics file."""

    def __init__(self, run_folder: Path, restarts: int) -> None:
        """Stand by; `restarts` is what `count_starts` has returned at this start."""
        self._run_folder, self._restarts = run_folder, restarts

    def begin(self, first_step: int) -> None:
        drop_superseded(self._run_folder, first_step)
        # Before the first line of figures, too: a start that ends before it counts.
        append_metrics(self._run_folder, max(0, first_step - 1), {RESTARTS: self._restarts})

    def write(self, step: int, figures: Mapping[str, float], about: About) -> None:
        append_metrics(self._run_folder, step, figures)


def append_metrics(run_folder: Path, step: int, figures: Mapping[str, float]) -> None:
    """Add the figures of a step.

    Raises:
        OSError: the line could not be written; the file is as before.
    """
    line = json.dumps({"step": step, "time": round(time.time(), 3), **figures}) + "\n"
    with metrics_path(run_folder).open("ab", buffering=0) as handle:
        end = handle.tell()
        if handle.write(content := line.encode()) < len(content):
            handle.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), handle.name)


def count_starts(run_folder: Path) -> int:
    """How often the run was started before, steps that are superseded included."""
    return 1 + max(
        (entry[RESTARTS] for entry in read_metrics(run_folder) if isinstance(entry.get(RESTARTS), int)),
        default=-1,
    )


def drop_superseded(run_folder: Path, first_step: int) -> None:
    """Forget the figures of `first_step` and later: a resumed run writes them again."""
    path = metrics_path(run_folder)
    if not path.exists():
        return
    kept = [entry for entry in read_metrics(run_folder) if entry["step"] < first_step]
    replace_file(path, "".join(json.dumps(entry) + "\n" for entry in kept))
