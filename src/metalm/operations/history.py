"""The starts and ends of a run's jobs, as the batch scripts record them in its `logs` folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metalm.regular_files import read_regular
from metalm.run_folder import LOGS_NAME

ATTEMPTS_NAME = "attempts.jsonl"

_OF_ALL: dict[str, Any] = {"job": str, "time": (int, float), "step": int}
_KINDS = {
    "start": {**_OF_ALL, "nodes": str, "ranks": int},
    "end": {**_OF_ALL, "code": int, "cause": str, "comes_back": bool},
}
"""Of the values that a line must have, by its event."""


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
    """All starts that the batch scripts have recorded, oldest first.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    attempts: list[Attempt] = []
    path = run_folder / LOGS_NAME / ATTEMPTS_NAME
    if not path.exists():
        return attempts
    for entry in _entries(read_regular(path).decode(errors="replace").splitlines()):
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


def _entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines as objects; one that is empty, still being written or no record is left out."""
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        event = entry.get("event") if isinstance(entry, dict) else None
        kinds = _KINDS.get(event) if isinstance(event, str) else None
        if kinds and all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
            yield entry
