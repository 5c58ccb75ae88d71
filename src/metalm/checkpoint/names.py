"""Names in a run's folder of checkpoints, for programs that start without torch and pydantic, too."""

from __future__ import annotations

import re
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
DAMAGED_SUFFIX = ".damaged"
"""Of a checkpoint that a run has passed over: for people to look at, and no checkpoint to any program."""
CHECKPOINTS_NAME = "checkpoints"
BEST_NAME = "best"
"""A file that names the best checkpoint of a run, where one is kept."""
CONFIG_NAME = "config.yaml"
"""The config of the run, in a checkpoint and in the run's folder."""
STEP_NAME = re.compile(r"step_([0-9]{8,})")


def step_of(folder: Path) -> int:
    """Step of a checkpoint, by the name of its folder."""
    return int(folder.name.removeprefix("step_"))


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return checkpoints / f"step_{step:08d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Folder in which the checkpoint of a step is written before it is published."""
    return checkpoints / f"step_{step:08d}{PARTIAL_SUFFIX}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Published checkpoints, whole or not, oldest first."""
    steps = [
        int(found[1]) for path in checkpoints.glob("step_*") if (found := STEP_NAME.fullmatch(path.name))
    ]
    folders = (step_folder(checkpoints, step) for step in sorted(set(steps)))
    return [folder for folder in folders if folder.is_dir()]


def damaged_name(folder: Path) -> Path:
    """What a checkpoint is called once it has been passed over as damaged."""
    return folder.with_name(folder.name + DAMAGED_SUFFIX)


def list_damaged(checkpoints: Path) -> list[Path]:
    """Checkpoints that were passed over as damaged, by the names that they had before; in any order."""
    paths = (path.with_suffix("") for path in checkpoints.glob("step_*" + DAMAGED_SUFFIX))
    return [path for path in paths if STEP_NAME.fullmatch(path.name)]
