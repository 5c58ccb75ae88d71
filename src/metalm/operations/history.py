"""What a run has left in its `logs` folder: the newest figures, and the jobs' starts and ends.

The metrics file is read from its end, so that the answer takes as long for a run of a million steps as for
one of ten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metalm.run_folder import METRICS_NAME

ATTEMPTS_NAME = "attempts.jsonl"
_BLOCK_BYTES = 1 << 16
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Attempt:
    """One start of a run by a Slurm job. Without an end it is running, or was lost with its node.

    A job that ended before it started any rank has an end alone: its `ranks` are 0.
    """

    job: str
    nodes: str
    ranks: int
    began: float
    first_step: int
    ended: float | None = None
    code: int | None = None
    cause: str | None = None
    comes_back: bool = False


def read_attempts(run_folder: Path) -> list[Attempt]:
    """All starts that the batch scripts have recorded, oldest first."""
    attempts: list[Attempt] = []
    path = run_folder / "logs" / ATTEMPTS_NAME
    if not path.exists():
        return attempts
    for entry in _entries(path.read_text().splitlines()):
        if entry["event"] == "start":
            attempts.append(
                Attempt(entry["job"], entry["nodes"], entry["ranks"], entry["time"], entry["step"])
            )
            continue
        if attempts and attempts[-1].job == entry["job"] and attempts[-1].ended is None:
            last = attempts.pop()
        else:
            last = Attempt(entry["job"], "", 0, entry["time"], entry["step"])
        end = {"ended": entry["time"], **{name: entry[name] for name in ("code", "cause", "comes_back")}}
        attempts.append(replace(last, **end))
    return attempts


def newest_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The last figures that were written, newest first, of up to a mebibyte of the file."""
    path = run_folder / "logs" / METRICS_NAME
    return list(_entries(_lines_from_end(path))) if path.exists() else []


def all_metrics(run_folder: Path) -> Iterator[dict[str, Any]]:
    """All figures that were written, oldest first."""
    path = run_folder / "logs" / METRICS_NAME
    if path.exists():
        with path.open(errors="replace") as handle:
            yield from _entries(handle)


def _lines_from_end(path: Path) -> Iterator[str]:
    with path.open("rb") as handle:
        end = handle.seek(0, os.SEEK_END)
        first, cut = end, b""
        while first > 0 and end - first < _MOST_BYTES:
            size = min(_BLOCK_BYTES, first)
            first = handle.seek(first - size)
            cut, *whole = (handle.read(size) + cut).split(b"\n")
            for line in reversed(whole):
                yield line.decode(errors="replace")
        if first == 0:
            yield cut.decode(errors="replace")


def _entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines as objects; one that is empty or still being written is left out."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
