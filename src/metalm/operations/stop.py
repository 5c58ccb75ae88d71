"""`metalm stop RUN`: ask a run to save and end."""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from pathlib import Path

from metalm.errors import ConfigError
from metalm.operations.status import is_run, read_run
from metalm.outputs import writing
from metalm.regular_files import read_regular
from metalm.run_folder import LOGS_NAME, STOP_NAME


def stop(run_folder: Path) -> int:
    """Write the stop file, with who asked and when; the ranks look for it before each step.

    A job that Slurm queues again by itself stays away as well: only requests of the job itself bring it
    back, and those are replaced.

    Raises:
        ConfigError: there is no run in this folder, or this user may not write into it.
    """
    if not (run_folder / LOGS_NAME).is_dir():
        raise ConfigError(f"{run_folder} is no run folder: it has no logs")
    path = run_folder / STOP_NAME
    asker = ""
    with contextlib.suppress(OSError):  # none, or none that can be read: it is replaced
        asker = read_regular(path).decode(errors="replace").strip()
    if asker and not asker.startswith("job "):
        print(f"{run_folder} has been asked to stop before: {asker}")
        return 0
    word = path.with_name(f"{path.name}.{os.getpid()}")  # moved, so that nobody reads half of it
    try:
        with writing(path, "ask as a user who may write into the run's folder, such as its owner"):
            word.write_text(f"{_user()} {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            word.replace(path)
    finally:
        with contextlib.suppress(OSError):
            word.unlink()
    try:
        state = read_run(run_folder, time.time()).state if is_run(run_folder) else None
    except ConfigError:
        state = None  # what cannot be read may be at work all the same
    if state is not None and not state.goes_on:
        print(
            f"{run_folder} is not at work: {state}. Its next start will end at once, unless {path} is removed"
        )
        return 0
    print(f"{run_folder} saves and ends after its step; `metalm status {run_folder}` tells when")
    return 0


def _user() -> str:
    """The user's name, or number where there is none, as in containers with users of their own."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
