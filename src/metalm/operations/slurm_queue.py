"""What Slurm says of the jobs of runs that wait."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from metalm.run_folder import SUBMITTED_NAME, TRAINING_TEMPLATES

_PATIENCE_S = 20.0
_FORMAT = "%A|%T|%r|%o"
"""Number, state, the reason why it waits, and the script with its words."""
_SUBMITTED = re.compile(
    rf"(.+)/{SUBMITTED_NAME}/[^/]+/code/slurm/(?:{'|'.join(map(re.escape, TRAINING_TEMPLATES))})(?: |$)"
)
"""The script of a snapshot, behind the run's folder."""


@dataclass(frozen=True)
class QueuedJob:
    """A job that is pending, runs or ends."""

    number: str
    state: str
    reason: str
    script: str
    """Path of the batch script, and what it is given."""

    @property
    def run(self) -> str | None:
        """The folder of the run that `metalm submit` has made it train; None: it is no such job."""
        found = _SUBMITTED.match(self.script)
        return os.path.realpath(found[1]) if found else None

    def __str__(self) -> str:
        why = f": {self.reason}" if self.state == "PENDING" and self.reason != "None" else ""
        return f"job {self.number} is {self.state.lower()}{why}"


@dataclass(frozen=True)
class SlurmQueue:
    """The queue as `squeue` lists it, which is asked once for each user whose runs wait."""

    _jobs: dict[str, list[QueuedJob] | None] = field(default_factory=dict)

    def job_of(self, run_folder: Path, user: str, numbers: tuple[str, ...]) -> QueuedJob | None:
        """The oldest job that trains a run: one that `metalm submit` has made, or one of these numbers.

        Args:
            user: who has submitted it.

        Raises:
            LookupError: Slurm cannot be asked here, or may hide the jobs of this user.
        """
        if user not in self._jobs:
            self._jobs[user] = _ask(user)
        jobs = self._jobs[user]
        if jobs is None:
            raise LookupError("no Slurm answers here")
        run = os.path.realpath(run_folder)
        of_run = (job for job in jobs if job.number in numbers or job.run == run)
        job = min(of_run, key=lambda job: int(job.number), default=None)
        if job is None and os.getuid() not in (0, pwd.getpwnam(user).pw_uid):
            raise LookupError(f"jobs of {user} may be hidden")
        return job


def _ask(user: str) -> list[QueuedJob] | None:
    """The jobs of a user; None: there is no Slurm, or it does not answer."""
    command = ["squeue", "--noheader", f"--user={user}", f"--format={_FORMAT}"]
    # Without what a user has set for tables of their own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.decode(errors="replace").splitlines()
    cells = [line.split("|", 3) for line in lines]
    return [QueuedJob(*found) for found in cells if len(found) == 4 and found[0].isdecimal()]
