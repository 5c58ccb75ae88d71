"""The checkpoints of a run: which there are, which is the newest, which may go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from metalm.checkpoint.manifest import LATEST_NAME, PARTIAL_SUFFIX, check_files, read_manifest
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


def prune_checkpoints(
    checkpoints: Path, keep_last: int, keep_every_steps: int | None, whole: Path | None = None
) -> list[Path]:
    """Remove what a killed save left and all but the last `keep_last` checkpoints; answer what is gone.

    Multiples of `keep_every_steps` stay for ever, and so does the newest whole checkpoint where all that
    would be kept are damaged. A folder loses its name before its content, so that nothing half-removed
    looks like a checkpoint.

    Args:
        checkpoints: folder of a run's checkpoints.
        keep_last: at least 1.
        keep_every_steps: None to keep none for ever.
        whole: one of the kept that is known to be whole; without it they are hashed.
    """
    removed = list(checkpoints.glob("step_*" + PARTIAL_SUFFIX))
    published = list_checkpoints(checkpoints)
    doomed = [
        folder
        for folder in published[:-keep_last]
        if not (keep_every_steps and _step_of(folder) % keep_every_steps == 0)
    ]
    kept = [folder for folder in published if folder not in doomed]
    if doomed and whole not in kept and not any(map(is_whole, reversed(kept))):
        spared = next(filter(is_whole, reversed(doomed)), None)
        doomed = [folder for folder in doomed if folder != spared]
    for folder in doomed:
        nameless = folder.with_name(folder.name + PARTIAL_SUFFIX)
        folder.replace(nameless)
        removed.append(nameless)
    for folder in removed:
        shutil.rmtree(folder)
    return removed


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is as its manifest says."""
    try:
        return not check_files(folder, read_manifest(folder).items())
    except CheckpointError:
        return False


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
