"""Pictures of what a model answered about images: each with its question, the answer and what was right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metalm.config.model_schema import TEXT
from metalm.errors import BadSample, ConfigError, DataError
from metalm.modalities.image import caption_picture, decode_image
from metalm.tasks.records import TaskData
from metalm.tasks.rendering import UnusableRecord, render
from metalm.tasks.task_file import TaskFile

_IMAGE = "image"


def draw_answers(task: TaskFile, root: Path, answers: Path, count: int, columns: int) -> np.ndarray:
    """The first answers about images as one picture, boxes drawn.

    Args:
        root: the folder of all tasks' data.
        answers: a file that an evaluation wrote, `answers/TASK-SPLIT-....jsonl`.
        columns: pictures in a row.

    Returns:
        Pixels [height, width, 3] uint8.

    Raises:
        ConfigError: the file holds no answers to the task.
        DataError: the task's data cannot be read, or none of the answers is about an image.
    """
    split, said = _answers(answers)
    pictures: list[np.ndarray] = []
    for record in TaskData(task, root).records(split):
        answer = said.get(record.key)
        if len(pictures) == count:
            break
        if answer is None or "prediction" not in answer:
            continue
        try:
            example = render(task, task.templates_for("evaluation")[0], record, record.answers[0])
            images = [
                bytes(p.content)
                for p in example.parts
                if p.modality == _IMAGE and not isinstance(p.content, str)
            ]
            asked = [
                p.content for p in example.prompt().parts if p.modality == TEXT and isinstance(p.content, str)
            ]
            lines = [" ".join(asked), f"answer: {answer['prediction']}", f"right: {answer['references'][0]}"]
            pictures += [caption_picture(decode_image(image), lines) for image in images[:1]]
        except (UnusableRecord, BadSample):
            continue
    if not pictures:
        raise DataError(f"{answers}: none of its answers is about an image of {task.task}")
    return _grid(pictures, columns)


def _answers(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """The split that they are of, and the answers by their records' keys."""
    try:
        about, *answers = [json.loads(line) for line in path.read_text().splitlines()] or [{"split": ""}]
        split, found = str(about["split"]), dict(answers)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ConfigError(f"{path} holds no answers of an evaluation of tasks: {error}") from None
    if not found:
        raise ConfigError(f"{path} holds no answers")
    return split, found


def _grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    height = max(len(one) for one in pictures)
    blank = np.full_like(pictures[0], 255, shape=(height, *pictures[0].shape[1:]))
    filled = [np.concatenate([one, blank[len(one) :]]) for one in pictures]
    filled += [blank] * (-len(filled) % columns)
    rows = [
        np.concatenate(filled[first : first + columns], axis=1) for first in range(0, len(filled), columns)
    ]
    return np.concatenate(rows)
