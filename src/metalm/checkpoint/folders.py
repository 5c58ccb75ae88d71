"""The checkpoints of a run: which there are, which is the newest, which may go."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from metalm.checkpoint.best import read_best
from metalm.checkpoint.manifest import check_files, read_manifest, remove
from metalm.checkpoint.names import (
    BEST_NAME,
    CHECKPOINTS_NAME,
    PARTIAL_SUFFIX,
    STEP_NAME,
    damaged_name,
    list_checkpoints,
    list_damaged,
    step_of,
)
from metalm.errors import CheckpointError

logger = logging.getLogger(__name__)


def checkpoints_of(path: Path) -> Path:
    """The folder of checkpoints that a path means: a run's, or its `checkpoints` folder itself."""
    inside = path / CHECKPOINTS_NAME
    return inside if inside.is_dir() else path


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: a step folder, what `checkpoints/best` names, or the newest one of a
    run or `checkpoints` folder.

    The newest is the last whose manifest can be read and whose files are there with their sizes; others
    are named in the log. Contents are not hashed.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (path, Path(os.path.realpath(path))):  # the second as `.`, or behind a link
        if STEP_NAME.fullmatch(folder.name) and folder.is_dir():
            return folder
    if path.name == BEST_NAME and not path.is_dir():
        best = read_best(path.parent)
        if best is None or not (path.parent / best.folder).is_dir():
            raise CheckpointError(f"{path} names no checkpoint of {path.parent}")
        return path.parent / best.folder
    published = list_checkpoints(checkpoints_of(path))
    if not published:
        raise CheckpointError(f"{path} is neither a checkpoint nor a run folder that holds one")
    for folder in reversed(published):
        problems = find_problems(folder, hashed=False)
        if not problems:
            return folder
        logger.warning("checkpoint %s is passed over: %s", folder, "; ".join(problems[:3]))
    raise CheckpointError(f"none of the {len(published)} checkpoint(s) of {path} is whole")


def find_problems(folder: Path, *, hashed: bool = True) -> list[str]:
    """What is wrong with a checkpoint, one line each; nothing if every file is as its manifest says."""
    try:
        return check_files(folder, read_manifest(folder).items(), hashed=hashed)
    except CheckpointError as error:
        return [str(error)]


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is as its manifest says."""
    return not find_problems(folder)


def prune_checkpoints(
    checkpoints: Path, keep_last: int, keep_every_steps: int | None, whole: Path | None = None
) -> list[Path]:
    """Remove what a killed save left and all but the last `keep_last` checkpoints; answer what is gone.

    Multiples of `keep_every_steps` and what is named the best stay for ever, and so does the newest whole
    checkpoint where all that would be kept are damaged. A folder loses its name before its content, so that
    nothing half-removed looks like a checkpoint. Of a checkpoint that was moved away and linked back, the
    link goes. What was passed over as damaged goes when a checkpoint of its step or a later one is there.

    Args:
        checkpoints: folder of a run's checkpoints.
        keep_last: at least 1.
        keep_every_steps: None to keep none for ever.
        whole: one of the kept that is known to be whole; without it they are hashed.

    Raises:
        OSError: something could not be removed; the rest is gone.
    """
    published = list_checkpoints(checkpoints)
    best = read_best(checkpoints)
    doomed = [
        folder
        for folder in published[:-keep_last]
        if not (keep_every_steps and step_of(folder) % keep_every_steps == 0)
        and not (best is not None and best.folder == folder.name)
    ]
    damaged = [
        damaged_name(folder)
        for folder in list_damaged(checkpoints)
        if published and step_of(folder) <= step_of(published[-1])
    ]
    kept = [folder for folder in published if folder not in doomed]
    if (doomed or damaged) and whole not in kept and not any(map(is_whole, reversed(kept))):
        spared = next(filter(is_whole, reversed(doomed)), None)
        doomed, damaged = [folder for folder in doomed if folder != spared], []
    return _remove_all([*_leftovers(checkpoints), *damaged, *doomed])


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that no program takes it for one that a run goes on from.

    One that cannot be renamed is named in the log.
    """
    aside = damaged_name(folder)
    try:
        remove(aside)
        folder.replace(aside)
    except OSError as error:
        logger.warning("the damaged checkpoint %s could not be renamed: %s", folder, error)
    else:
        logger.warning("the damaged checkpoint %s is now called %s", folder, aside.name)


def remove_later(checkpoints: Path, step: int) -> list[Path]:
    """Remove the checkpoints of steps after this one, and `best` if it names one; answer what is gone.

    Raises:
        OSError: something could not be removed; the rest is gone.
    """
    later = [folder for folder in list_checkpoints(checkpoints) if step_of(folder) > step]
    best = read_best(checkpoints)
    removed = _remove_all(later)
    if best is not None and best.step > step:
        (checkpoints / BEST_NAME).unlink()
    return removed


def remove_leftovers(checkpoints: Path) -> list[Path]:
    """Remove what killed saves and removals have left; answer what is gone.

    Raises:
        OSError: something could not be removed; the rest is gone.
    """
    return _remove_all(_leftovers(checkpoints))


def _leftovers(checkpoints: Path) -> list[Path]:
    return list(checkpoints.glob("step_*" + PARTIAL_SUFFIX))


def _remove_all(folders: Sequence[Path]) -> list[Path]:
    removed: list[Path] = []
    errors: list[OSError] = []
    for folder in folders:
        try:
            removed.append(_remove_nameless(folder))
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return removed


def _remove_nameless(folder: Path) -> Path:
    """The folder, which loses its name first."""
    nameless = folder
    if not folder.name.endswith(PARTIAL_SUFFIX):
        nameless = folder.with_name(folder.name + PARTIAL_SUFFIX)
        folder.replace(nameless)
    remove(nameless)
    return folder
