"""Tasks as people look at them: lists, checks, and rendered examples."""

from __future__ import annotations

import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from metalm.config.model_schema import TEXT
from metalm.data.documents.example import Example
from metalm.errors import BadSample, ConfigError, DataError
from metalm.modalities import MEDIA
from metalm.modalities.image import write_png
from metalm.outputs import writing
from metalm.progress import Phase
from metalm.tasks.metrics import find_metric
from metalm.tasks.readers import BadRecord, check_reader
from metalm.tasks.records import Tally, TaskData
from metalm.tasks.rendering import PARAGRAPH, UnusableRecord, answer_alone, render
from metalm.tasks.task_file import IN_CONTEXT, TaskFile, find_tasks, load_task

ENCODED, TRAINED, PLAIN = "\033[36m", "\033[1;32m", "\033[0m"
"""Colours of a terminal for what an encoder reads and what is learnt."""
_MARKUP = {ENCODED: ("<span>", "</span>"), TRAINED: ("<target>", "</target>")}


def list_tasks() -> Iterator[str]:
    """A line for each task that comes with MetaLM."""
    for name in find_tasks():
        task = load_task(name)
        scored = ", ".join(task.metrics) + (f"; in context by {task.icl.score}" if task.icl else "")
        yield f"{name:<22}{task.cluster:<16}{len(task.templates):>3} template(s)   {scored}"


def check_task(name: str, root: Path) -> Iterator[str]:
    """Render all of a task, in all wordings, and tell what it holds.

    Raises:
        ConfigError, DataError: the file, or the data, cannot be used.
    """
    task = load_task(name)
    check_reader(task.data)
    for metric in task.metrics:
        find_metric(metric)
    data = TaskData(task, root)
    for split in task.data.splits:
        tally = Tally()
        records = data.records(split, tally)
        templates = [*task.templates, *([task.icl.template] if task.icl else [])]
        for record in Phase.over(f"wording {split}", list(records), "records"):
            try:
                for template in templates:
                    for answer in record.options or record.answers:
                        render(task, template, record, answer)
                if task.icl and task.icl.normalise == "answer_context":
                    answer_alone(task, task.icl.template, record, record.answers[0])
            except UnusableRecord as unusable:
                tally.kept -= 1
                tally.drop(BadRecord(unusable.cause, f"{record.key}, {unusable}"))
        yield from (f"{split}: {line}" for line in tally.lines())
        if not tally.kept:
            raise DataError(f"{task.task}: no record of {split} can be worded")


def show_task(
    name: str,
    root: Path,
    split: str | None,
    count: int,
    template_id: str | None = None,
    pictures: Path | None = None,
) -> Iterator[str]:
    """The first examples of a split, as they are learnt; in colour on a terminal, else with markup.

    Args:
        pictures: a folder for their images, with their texts, and clips.

    Raises:
        ConfigError, DataError: the file, or the data, cannot be used.
    """
    task = load_task(name)
    templates = [*task.templates, *([task.icl.template] if task.icl else [])]
    if template_id is not None:
        templates = [template for template in templates if template.id == template_id]
        if not templates:
            raise ConfigError(f"{task.task} has no template {template_id}; it has {', '.join(_ids(task))}")
    in_colour = sys.stdout.isatty()
    for record in TaskData(task, root).records(split or task.evaluated_on)[:count]:
        for template in templates:
            example = render(task, template, record, record.answers[0])
            yield f"--- {record.key}, {template.id}"
            yield shown(example, in_colour=in_colour)
            if pictures is not None:
                with writing(pictures, "name another folder with --pictures"):
                    _write_media(
                        example, pictures, f"{task.task}-{record.key}-{template.id}".replace(":", "-")
                    )


def shown(example: Example, *, in_colour: bool = False) -> str:
    """An example as text: what is encoded and what is learnt stand out, and `</s>` ends its line."""
    written = []
    for part in example.parts:
        text = part.content if isinstance(part.content, str) else f"<{part.modality}>"
        colour = ENCODED if part.is_encoded else TRAINED if part.is_trained else PLAIN
        begin, end = (colour, PLAIN) if in_colour else _MARKUP.get(colour, ("", ""))
        text = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
        if text:
            written.append(f"{begin}{text.replace(PARAGRAPH, '</s>' + chr(10))}{end}")
    return "".join(written)


def _ids(task: TaskFile) -> list[str]:
    return [template.id for template in task.templates] + ([IN_CONTEXT] if task.icl else [])


class _Folder:
    """A folder as a board for images and clips."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        write_png(self._folder / f"{name}-{step}.png", pixels)

    def write_audio(self, step: int, name: str, samples: np.ndarray, sampling_rate: int) -> None:
        with wave.open(str(self._folder / f"{name}-{step}.wav"), "wb") as file:
            file.setparams((1, 2, sampling_rate, len(samples), "NONE", ""))
            file.writeframes((samples * 32767).astype("<i2").tobytes())


def _write_media(example: Example, folder: Path, name: str) -> None:
    board = _Folder(folder)
    lines = shown(example).splitlines()
    for number, part in enumerate(part for part in example.parts if part.modality != TEXT):
        assert isinstance(part.content, bytes)
        modality = MEDIA[part.modality]
        try:
            modality.show(board, number, name, modality.decode(part.content), lines, first=True)
        except BadSample as failure:
            raise DataError(f"{name}: an {modality.noun} cannot be decoded ({failure.cause})") from None
