"""`metalm evaluate-tasks RUN`: a run's newest checkpoint on tasks, on the ranks of its topology."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from metalm.checkpoint.manifest import MANIFEST_NAME
from metalm.config import RunConfig
from metalm.config.schema import TasksConfig
from metalm.data.corpus import Corpus
from metalm.errors import ConfigError
from metalm.evaluation.answering import EngineAnswerer
from metalm.evaluation.answers_file import ELSEWHERE
from metalm.evaluation.task_results import TaskResult, figures
from metalm.evaluation.task_scores import Evaluated, evaluate_tasks
from metalm.objectives import build_objective
from metalm.outputs import require_folder_place
from metalm.parallel.agreement import together
from metalm.parallel.topology import Topology
from metalm.tasks.task_file import TaskFile, load_tasks
from metalm.tasks.ways import TaskSettings
from metalm.training.check_start import task_settings
from metalm.training.engines import Engines
from metalm.training.evaluate import load_newest
from metalm.training.joining import Joined
from metalm.training.monitor.sink import About
from metalm.training.monitor.tensorboard import TensorBoard
from metalm.training.session import open_session

logger = logging.getLogger(__name__)


def score_in_training(
    engines: Engines,
    topology: Topology,
    corpus: Corpus,
    wanted: TasksConfig,
    out: Path,
    beat: Callable[[], None],
) -> dict[str, float]:
    """What a run has reached on its tasks: see `figures`.

    Args:
        out: folder of answers and results, which is emptied first.
        beat: is called while it goes on.

    Raises:
        ConfigError, DataError: as `evaluate_tasks`, on all ranks alike.

    Collective: all ranks.
    """
    if topology.rank == 0:
        shutil.rmtree(out, ignore_errors=True)
    answerer = EngineAnswerer(engines, topology, corpus, batch_size=wanted.batch_size)
    with together():
        tasks = load_tasks(wanted.names)
    model = Evaluated(out.name, "as it is being trained")
    results = evaluate_tasks(
        answerer, tasks, task_settings(wanted), model, out, report=lambda line: None, beat=beat
    )
    return figures(results)


def evaluate_run(
    joined: Joined, tasks: Sequence[TaskFile], settings: TaskSettings, out: Path | None, *, batch_size: int
) -> None:
    """Evaluate a run on tasks.

    Args:
        out: where answers, results and logs go; default: `tasks/step_N` in the run's folder, and its own.
        batch_size: documents that a data-parallel rank takes at once.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        ConfigError, DataError: as `evaluate_tasks`.

    Collective: all ranks.
    """
    corpus = joined.corpus
    objective = build_objective(corpus.config)
    if not objective.generates:
        raise ConfigError(f"a run of {objective.name} generates nothing, so that it answers no task")
    with open_session(joined) as session:
        with together():
            if session.is_first:
                require_folder_place(out or session.run_folder / "tasks", ELSEWHERE)
        engines, checkpoint = load_newest(corpus, session)
        step = checkpoint.step
        session.log.open(out)
        answerer = EngineAnswerer(engines, session.topology, corpus, batch_size=batch_size)
        place = out or session.run_folder / "tasks" / f"step_{step:08d}"
        model = Evaluated(
            f"{session.run_folder} at step {step}", _fingerprint(corpus.config, checkpoint.folder)
        )
        results = evaluate_tasks(answerer, tasks, settings, model, place, print)
        if session.is_first and corpus.config.monitor.sinks.tensorboard:
            _show(results, step, corpus.config, session.run_folder)


def _show(results: Sequence[TaskResult], step: int, config: RunConfig, run_folder: Path) -> None:
    """Put the scores on the run's TensorBoard, if this user may write there."""
    try:
        require_folder_place(run_folder / "tensorboard", "it lacks these scores")
    except ConfigError as problem:
        logger.warning(problem)
        return
    board = TensorBoard(config, run_folder)
    board.reopen()
    board.write(step, {f"tasks/{name}": score for name, score in figures(results).items()}, About.TASKS)
    board.close()


def _fingerprint(config: RunConfig, checkpoint: Path) -> str:
    """Of what answers depend on: the weights, by their hashes in the manifest, and what is overridden."""
    asked = (config.model.model_dump_json(), config.data.sequence_length, config.training.precision)
    return hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes() + repr(asked).encode()).hexdigest()
