"""The checkpoints of a run: which there are, which is the newest, which may go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from metalm.checkpoint.manifest import LATEST_NAME, PARTIAL_SUFFIX
from metalm.errors import CheckpointError

_STEP = re.compile(r"step_(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return checkpoints / f"step_{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = {
        int(m[1]): p for p in checkpoints.glob("step_*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()
    }
    return [found[step] for step in sorted(found)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: a step folder, a run folder, or its `checkpoints` folder.

    Raises:
        CheckpointError: there is none.
    """
    if _STEP.fullmatch(path.name) and path.is_dir():
        return path
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    latest = checkpoints / LATEST_NAME
    if (
        latest.is_file()
        and _STEP.fullmatch(name := latest.read_text().strip())
        and (checkpoints / name).is_dir()
    ):
        return checkpoints / name
    published = list_checkpoints(checkpoints)
    if not published:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder that holds one")
    return published[-1]


def prune_checkpoints(checkpoints: Path, keep_last: int, keep_every_steps: int | None) -> list[Path]:
    """Remove what a killed save left and all but the last `keep_last` checkpoints; answer what is gone.

    Multiples of `keep_every_steps` stay for ever. A folder loses its name before its content, so that
    nothing half-removed looks like a checkpoint.
    """
    removed = list(checkpoints.glob("step_*" + PARTIAL_SUFFIX))
    for folder in list_checkpoints(checkpoints)[:-keep_last]:
        if keep_every_steps and int(folder.name.removeprefix("step_")) % keep_every_steps == 0:
            continue
        doomed = folder.with_name(folder.name + PARTIAL_SUFFIX)
        folder.replace(doomed)
        removed.append(doomed)
    for folder in removed:
        shutil.rmtree(folder)
    return removed
