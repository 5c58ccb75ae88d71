"""In which ways tasks are asked and scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from metalm.errors import ConfigError
from metalm.tasks.metrics import find_metric
from metalm.tasks.task_file import ANSWER, TaskFile, Template, placeholders

ScoredBy = Literal["likelihood", "generation"]


class Way(NamedTuple):
    """One way in which a task is asked and scored."""

    template: Template
    num_shots: int
    scored_by: ScoredBy
    normalise: str


@dataclass(frozen=True)
class TaskSettings:
    """What of tasks is evaluated, and how."""

    data: Path
    """Folder of all tasks' data."""
    shots: tuple[int, ...] | None = None
    """Numbers of demonstrations, in the in-context wording; None: as finetuned, in the first template."""
    templates: int | None = None
    """As finetuned: in so many of the templates for evaluation."""
    scored_by: ScoredBy | None = None
    """None: as the task file says; of templates, by generation."""
    split: str | None = None
    """None: that which the task file says."""
    limit: int | None = None
    """Questions of a task, drawn from all."""
    seed: int = 0
    readers: Mapping[str, str] | None = None
    overflow: Literal["split", "cut_left", "cut_right"] = "split"

    def ways(self, task: TaskFile) -> list[Way]:
        """
        Raises:
            ConfigError: the task cannot be asked so.
        """
        if self.shots is not None:
            if self.templates is not None:
                raise ConfigError(
                    "--shots asks in the in-context wording, and --templates in others: give one"
                )
            if task.icl is None:
                raise ConfigError(f"{task.task} has no icl section, so it has no wording for --shots")
            by = self.scored_by or task.icl.score
            ways = [Way(task.icl.template, shots, by, task.icl.normalise) for shots in self.shots]
        else:
            templates = task.templates_for("evaluation")[: self.templates or 1]
            ways = [Way(template, 0, self.scored_by or "generation", "none") for template in templates]
        if task.options is None and any(way.scored_by == "likelihood" for way in ways):
            raise ConfigError(f"{task.task} has no options to compare by their likelihood")
        for way in ways:
            if way.scored_by == "generation" and not _asks_for_answer(task, way.template):
                raise ConfigError(
                    f"{task.task}: the wording {way.template.id} is for comparing options by likelihood: "
                    "what is generated in it is not the answer as the references have it"
                )
        return ways

    def check(self, task: TaskFile) -> None:
        """
        Raises:
            ConfigError: the task cannot be asked so, or there is no such split or metric, or no package.
        """
        self.ways(task)
        task.require_split(self.split or task.evaluated_on)
        for name in task.metrics:
            find_metric(name).require()


def _asks_for_answer(task: TaskFile, template: Template) -> bool:
    """Whether what a perfect model generates in a wording is the answer; of options, letter for letter."""
    names = {ANSWER} if task.options is not None else {ANSWER, task.answer}
    read = {name for line in template.read_lines() if isinstance(line, str) for name, _ in placeholders(line)}
    learnt = [filters for name, filters in placeholders(template.target) if name in names]
    return not names & read and bool(learnt) and not (learnt[0] and task.options is not None)
