"""No claim, passage, article or image of a task is on two sides of its split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metalm.errors import DataError
from metalm.tasks.data_files import DataFiles
from metalm.tasks.readers import read_records
from metalm.tasks.task_file import TaskFile

GROUP = "group"
"""The key of a record that names what it was split by."""


def check_groups(task: TaskFile, data: Path) -> None:
    """
    Raises:
        DataError: a record has no group, or one group is in two splits.
    """
    files = DataFiles(data / task.data.folder, task.data.archive)
    split_of: dict[Any, str] = {}
    for split in task.data.files:
        for number, record in enumerate(read_records(task.data, files, split)):
            if not isinstance(record, dict) or GROUP not in record:
                raise DataError(
                    f"{task.task}, {split}:{number}: the record has no {GROUP!r} that it is split by"
                )
            first = split_of.setdefault(record[GROUP], split)
            if first != split:
                raise DataError(
                    f"{task.task}: {GROUP} {record[GROUP]!r} is in {first} and in {split}, so what is tested "
                    "would be known from training"
                )
