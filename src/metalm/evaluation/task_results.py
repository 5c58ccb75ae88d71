"""What a model reached on tasks, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from metalm.tasks.metrics import Score
from metalm.tasks.task_file import IN_CONTEXT


@dataclass(frozen=True)
class TaskResult:
    """What a model reached on a task in one way."""

    task: str
    cluster: str
    split: str
    template: str
    shots: int
    scored_by: str
    scores: dict[str, Score]
    questions: int
    skipped: dict[str, int] = field(default_factory=dict)
    """By cause, questions and records that were left out."""

    @property
    def way(self) -> tuple[str, str, str, int, str]:
        """What tells it from other results of the same model."""
        return self.task, self.split, self.template, self.shots, self.scored_by

    def as_json(self) -> dict[str, Any]:
        """For results.json; a standard error that is not defined is null."""
        scores = {
            name: {
                "value": score.value,
                "standard_error": None if math.isnan(score.standard_error) else score.standard_error,
                "count": score.count,
            }
            for name, score in self.scores.items()
        }
        return {**self.__dict__, "scores": scores}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TaskResult:
        """Of `as_json`; further keys are left out.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is no result.
        """
        scores = {}
        for name, score in content["scores"].items():
            error = score["standard_error"]
            error = math.nan if error is None else float(error)
            scores[name] = Score(float(score["value"]), error, int(score["count"]))
        own = {one.name: content[one.name] for one in fields(cls)}
        return cls(**own | {"scores": scores, "skipped": dict(own["skipped"])})


def figures(results: Sequence[TaskResult]) -> dict[str, float]:
    """Scores by `TASK/METRIC`, or `TASK/K_shots/METRIC` in the wording for prompts; means over templates."""
    values: dict[str, list[float]] = {}
    for one in results:
        shots = f"/{one.shots}_shots" if one.template == IN_CONTEXT else ""
        for name, score in one.scores.items():
            values.setdefault(f"{one.task}{shots}/{name}", []).append(score.value)
    return {name: _mean(of_templates) for name, of_templates in values.items()}


def table(results: Sequence[TaskResult], model: str) -> str:
    """The results as Markdown; of several templates also their mean and best, of a cluster the mean."""
    lines = [
        f"# {model}",
        "",
        "| task | cluster | split | wording | shots | scored by | metric | value | questions | left out |",
        "|---|---|---|---|---:|---|---|---:|---:|---|",
        *rows_of(results),
    ]
    summary = list(_summary(results))
    if summary:
        lines += ["", "| of | metric | mean | best |", "|---|---|---:|---:|", *summary]
    return "\n".join(lines) + "\n"


def rows_of(results: Iterable[TaskResult]) -> Iterator[str]:
    """A row of the table for each metric of each result."""
    for one in results:
        left_out = ", ".join(f"{count} {cause}" for cause, count in one.skipped.items())
        for name, score in one.scores.items():
            cells = (one.task, one.cluster, one.split, one.template, one.shots, one.scored_by, name)
            error = "" if math.isnan(score.standard_error) else f" ± {score.standard_error:.4f}"
            value = f"{score.value:.4f}{error}"
            yield f"| {' | '.join(map(str, cells))} | {value} | {score.count:,} | {left_out} |"


def _summary(results: Sequence[TaskResult]) -> Iterator[str]:
    """Of tasks in several templates their mean and best; of clusters of several tasks the mean over these.

    A cluster with a task in several splits has none: which of them would count?
    """
    by_task: dict[tuple[str, str, str], dict[tuple[str, str], list[float]]] = {}
    for one in results:
        metric = next(iter(one.scores))
        wording = f"{one.shots} shots" if one.template == IN_CONTEXT else "as finetuned"
        of_task = by_task.setdefault((one.cluster, metric, f"{wording}, by {one.scored_by}"), {})
        of_task.setdefault((one.task, one.split), []).append(one.scores[metric].value)
    for (cluster, metric, how), tasks in by_task.items():
        for (task, split), values in tasks.items():
            if len(values) > 1:
                yield f"| {task}, {split}, {how} | {metric} | {_mean(values):.4f} | {max(values):.4f} |"
        if len({task for task, _ in tasks}) == len(tasks) > 1:
            means = [_mean(values) for values in tasks.values()]
            best = [max(values) for values in tasks.values()]
            yield f"| cluster {cluster}, {how} | {metric} | {_mean(means):.4f} | {_mean(best):.4f} |"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
