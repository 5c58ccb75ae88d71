"""Task files and data that are damaged, by seed: one message, or records left out and counted."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml

from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, MetaLMError
from metalm.tasks.readers import check_reader
from metalm.tasks.records import Tally, TaskData
from metalm.tasks.rendering import render
from metalm.tasks.task_file import find_tasks, load_task
from mutations import mutate_bytes, mutate_value

DATA = Path(__file__).parent / "data"
TASKS = list(find_tasks())
MUTATED_FILES_PER_TASK = 12
MUTATED_BYTES_PER_FILE = 15


@pytest.mark.parametrize("seed", range(3))
def test_damaged_task_files_are_refused_or_read(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    path = tmp_path / "task.yaml"
    for name in TASKS:
        content = yaml.safe_load(find_tasks()[name].read_text())
        for number in range(MUTATED_FILES_PER_TASK):
            if number % 2:
                path.write_text(yaml.safe_dump(mutate_value(content, chance), allow_unicode=False))
            else:
                path.write_bytes(mutate_bytes(find_tasks()[name].read_bytes(), chance))
            with contextlib.suppress(MetaLMError):
                task = load_task(path)
                check_reader(task.data)
                data = TaskData(task, DATA)
                for record in data.records(task.evaluated_on):
                    render(task, task.templates[0], record, record.answers[0])


@pytest.mark.parametrize("name", TASKS)
def test_damaged_data_is_refused_or_left_out(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    task, chance = load_task(name), random.Random(name)
    folder = tmp_path / task.data.folder
    shutil.copytree(DATA / task.data.folder, folder)
    files = TaskData(task, tmp_path).files.all_names(task.data.files_of(task.evaluated_on))
    for path in [folder / file for file in files][:2]:
        whole = path.read_bytes()
        for _ in range(MUTATED_BYTES_PER_FILE):
            path.write_bytes(mutate_bytes(whole, chance))
            with contextlib.suppress(MetaLMError):
                for record in TaskData(task, tmp_path).records(task.evaluated_on, Tally()):
                    for template in task.templates:
                        for part in render(task, template, record, record.answers[0]).parts:
                            if isinstance(part.content, str):
                                tokenizer.encode([part.content])
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("winograd", {"first": "a"}, "data.settings.first: got 'a', expected int"),
        ("trec", {"encoding": "latin-17"}, "data.settings.encoding: got 'latin-17', expected the name of"),
    ],
)
def test_a_readers_settings_are_of_its_types(task: str, setting: dict[str, str], message: str) -> None:
    data = load_task(find_tasks()[task]).data
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_reader(data.model_copy(update={"settings": {**data.settings, **setting}}))
