"""What Slurm says of the jobs of runs that wait."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from metalm.run_folder import SUBMITTED_NAME

_PATIENCE_S = 20.0
_FORMAT = "%A|%T|%r|%o"
"""Number, state, the reason why it waits, and the script with its words."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that is pending, runs or ends."""

    number: str
    state: str
    reason: str
    script: str
    """Path of the batch script, and what it is given."""

    def __str__(self) -> str:
        why = f": {self.reason}" if self.state == "PENDING" and self.reason != "None" else ""
        return f"job {self.number} is {self.state.lower()}{why}"


@dataclass(frozen=True)
class SlurmQueue:
    """The queue as `squeue` lists it, which is asked once for each user whose runs wait."""

    _jobs: dict[str, list[QueuedJob] | None] = field(default_factory=dict)

    def job_of(self, run_folder: Path, numbers: tuple[str, ...]) -> QueuedJob | None:
        """The oldest job of a run: one that `metalm submit` has made, or one of these numbers.

        Raises:
            LookupError: Slurm cannot be asked here.
        """
        user = run_folder.owner()
        if user not in self._jobs:
            self._jobs[user] = _ask(user)
        jobs = self._jobs[user]
        if jobs is None:
            raise LookupError("no Slurm answers here")
        snapshots = [f"{place / SUBMITTED_NAME}/" for place in (run_folder.absolute(), run_folder.resolve())]
        of_run = (job for job in jobs if job.number in numbers or job.script.startswith(tuple(snapshots)))
        return min(of_run, key=lambda job: int(job.number), default=None)


def _ask(user: str) -> list[QueuedJob] | None:
    """The jobs of a user; None: there is no Slurm, or it does not answer."""
    command = ["squeue", "--noheader", f"--user={user}", f"--format={_FORMAT}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.decode(errors="replace").splitlines()
    cells = [line.split("|", 3) for line in lines]
    return [QueuedJob(*found) for found in cells if len(found) == 4]
