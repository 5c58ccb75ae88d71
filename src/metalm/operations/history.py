"""The starts and ends of a run's jobs, as the batch scripts record them in its `logs` folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metalm.run_folder import LOGS_NAME

ATTEMPTS_NAME = "attempts.jsonl"


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
    path = run_folder / LOGS_NAME / ATTEMPTS_NAME
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


def _entries(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines as objects; one that is empty or still being written is left out."""
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
