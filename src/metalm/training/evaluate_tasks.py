"""`metalm evaluate-tasks RUN`: a run's newest checkpoint on tasks, on the ranks of its topology."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metalm.data.corpus import Corpus
from metalm.evaluation.answering import EngineAnswerer
from metalm.evaluation.task_scores import TaskSettings, evaluate_tasks
from metalm.tasks.task_file import TaskFile
from metalm.training.evaluate import load_newest
from metalm.training.session import open_session


def evaluate_run(
    corpus: Corpus, tasks: Sequence[TaskFile], settings: TaskSettings, out: Path | None, *, batch_size: int
) -> None:
    """Evaluate a run on tasks.

    Args:
        out: where answers and results go; default: `tasks/step_N` in the run's folder.
        batch_size: documents that a data-parallel rank takes at once.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        ConfigError, DataError: as `evaluate_tasks`.

    Collective: all ranks.
    """
    with open_session(corpus) as session:
        engines, step = load_newest(corpus, session)
        session.log.open()
        answerer = EngineAnswerer(engines, session.topology, corpus, batch_size=batch_size)
        place = out or session.run_folder / "tasks" / f"step_{step:08d}"
        evaluate_tasks(answerer, tasks, settings, f"{session.run_folder} at step {step}", place, print)
