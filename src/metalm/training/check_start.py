"""What must hold before ranks are joined or anything is written.

It is checked before torch, DeepSpeed and Megatron are imported: a start that is refused is refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.names import CHECKPOINTS_NAME, CONFIG_NAME, list_checkpoints
from metalm.config import RunConfig, load_config
from metalm.config.rules import check_topology
from metalm.config.schema import TasksConfig
from metalm.data.corpus import Corpus
from metalm.errors import CheckpointError
from metalm.objectives import build_objective
from metalm.tasks.records import TaskData
from metalm.tasks.task_file import load_tasks
from metalm.tasks.ways import TaskSettings


def check_start(config: RunConfig, world_size: int) -> Corpus:
    """Check that the ranks can hold the run, and open all of its data once; find what a new run starts from.

    Raises:
        TopologyError: so many ranks cannot hold the run.
        ConfigError: objective, sources, encoders and tokenizer do not fit each other, or a task is not there.
        DataError: a source, the tokenizer or a task's data cannot be used.
        CheckpointError: there are no weights where a new run is to take its own from.
    """
    check_topology(config, world_size)
    build_objective(config)
    corpus = Corpus(config)
    corpus.check()
    if (wanted := config.monitor.tasks) is not None:
        for task in load_tasks(wanted.names):
            task_settings(wanted).check(task)
            TaskData(task, wanted.data)
    if not list_checkpoints(config.run.folder / config.run.name / CHECKPOINTS_NAME):
        for key in ("run", "decoder", "encoders"):
            _check_initial(key, getattr(config.initialize, key))
    return corpus


def _check_initial(key: str, path: Path | None) -> None:
    """Find the checkpoint that `initialize` names."""
    if path is None:
        return
    try:
        find_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"initialize.{key}: {error}; train that run first, or give initialize.{key}=ANOTHER"
        ) from error


def task_settings(wanted: TasksConfig) -> TaskSettings:
    """How a run is scored on tasks while it trains."""
    return TaskSettings(data=wanted.data, shots=wanted.shots, limit=wanted.questions)


def open_run(run_folder: Path, overrides: Sequence[str], world_size: int) -> Corpus:
    """What a run's newest checkpoint was trained with, wherever the folder is now; no source is opened.

    Args:
        overrides: `section.key=value`, such as `parallel.tensor=1`.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ConfigError: an override does not fit.
        TopologyError: so many ranks cannot hold the run.
        DataError: the tokenizer is not where the run had it.
    """
    config = load_config(find_checkpoint(run_folder) / CONFIG_NAME, overrides)
    place = {"folder": run_folder.parent, "name": run_folder.name}
    config = config.model_copy(update={"run": config.run.model_copy(update=place)})
    check_topology(config, world_size)
    return Corpus(config)
