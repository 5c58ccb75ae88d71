"""How the starts of a run have ended, as the trainer itself has recorded it: a JSON object a line.

A start that was killed records nothing. It leaves the run's lock behind, whose holder is gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metalm.regular_files import read_regular
from metalm.run_folder import LOGS_NAME

ENDS_NAME = "ends.jsonl"
"""In `logs/`."""


@dataclass(frozen=True)
class RunEnd:
    """The end of one start."""

    time: float
    step: int | None
    """Steps done; None where that could not be told."""
    code: int
    """That the process ends with."""
    cause: str
    """In one line: `done`, who asked to stop, or the error."""
    host: str | None = None
    """Where the process ran; None in lines of older versions."""
    pid: int | None = None


_KINDS: dict[str, Any] = {"time": (int, float), "step": (int, type(None)), "code": int, "cause": str}
_KINDS |= {"host": (str, type(None)), "pid": (int, type(None))}


def record_end(run_folder: Path, step: int | None, code: int, cause: str) -> None:
    """Add the end of a start, which is this process.

    Raises:
        OSError: the line could not be written.
    """
    first_line = next(iter(cause.splitlines()), "")
    end = RunEnd(round(time.time(), 3), step, code, first_line, socket.gethostname(), os.getpid())
    with (run_folder / LOGS_NAME / ENDS_NAME).open("a") as handle:
        handle.write(json.dumps(asdict(end)) + "\n")


def last_end(run_folder: Path) -> RunEnd | None:
    """The newest end that was recorded."""
    return next(reversed(all_ends(run_folder)), None)


def all_ends(run_folder: Path) -> list[RunEnd]:
    """All ends that were recorded, oldest first; lines that are torn or record none are left out.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    path = run_folder / LOGS_NAME / ENDS_NAME
    if not path.exists():
        return []
    ends = []
    for line in read_regular(path).decode(errors="replace").splitlines():
        with suppress(ValueError, TypeError, RecursionError):
            end = RunEnd(**json.loads(line))
            if all(isinstance(value, _KINDS[name]) for name, value in asdict(end).items()):
                ends.append(end)
    return ends
