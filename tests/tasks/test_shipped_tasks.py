"""Every task file that comes with MetaLM, on invented records in its owner's exact format (tests/tasks/data).

What `metalm tasks show` prints of the first record in every wording stands in tests/tasks/expected.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metalm.tasks.records import Tally, TaskData
from metalm.tasks.rendering import render
from metalm.tasks.showing import check_task, show_task
from metalm.tasks.task_file import find_tasks, load_task

DATA, EXPECTED = Path(__file__).parent / "data", Path(__file__).parent / "expected"
TASKS = list(find_tasks())


@pytest.fixture
def fitted(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The file of a task that comes with MetaLM, but it holds out one record of the few here."""
    path = tmp_path / f"{request.param}.yaml"
    path.write_text(re.sub(r"(last|drawn): \d+\}", r"\1: 1}", find_tasks()[request.param].read_text()))
    return str(path)


@pytest.mark.parametrize("name", TASKS)
def test_rendered_as_expected(name: str) -> None:
    task = load_task(name)
    shown = "\n".join(show_task(name, DATA, task.evaluated_on, 1)) + "\n"
    assert shown == (EXPECTED / f"{name}.txt").read_text()


@pytest.mark.parametrize("fitted", TASKS, indirect=True)
def test_all_records_of_all_splits_are_worded(fitted: str) -> None:
    splits = {line.partition(":")[0] for line in check_task(fitted, DATA)}
    assert splits == set(load_task(fitted).data.splits)


@pytest.mark.parametrize("fitted", TASKS, indirect=True)
def test_targets_end_with_their_answers(fitted: str) -> None:
    task = load_task(fitted)
    for split in task.data.splits:
        for record in TaskData(task, DATA).records(split, Tally()):
            for template in task.templates_for("finetuning"):
                *_, target = render(task, template, record, record.answers[0]).parts
                assert target.is_trained
                assert isinstance(target.content, str)
                assert target.content.strip()


def test_the_papers_datasets_are_all_there() -> None:
    papers = [name for name in TASKS if name != "pointing"]  # that is the demo's
    assert len(papers) == 49  # E-SNLI-VE is two: labels and explanations
