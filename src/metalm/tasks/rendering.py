"""Records to examples: the one renderer of training rows, prompts, demonstrations and options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from metalm.config.model_schema import TEXT
from metalm.data.documents.example import Example, ExamplePart
from metalm.errors import ConfigError, DataError
from metalm.tasks.filters import LIST_FILTERS
from metalm.tasks.readers import MediaFile
from metalm.tasks.records import TaskRecord, filled_in
from metalm.tasks.task_file import ANSWER, OPTIONS, Line, TaskFile, Template

PARAGRAPH = "\n\n"
"""What stands between lines, and between demonstrations: the tokenizer makes it `</s>`."""
_NEWLINES = re.compile(r"\s*\n\s*")


class UnusableRecord(DataError):
    """A record that cannot be worded."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(cause, message)  # with both it travels between processes
        self.cause = cause
        """The name of the counter."""

    def __str__(self) -> str:
        return str(self.args[1])


def render(task: TaskFile, template: Template, record: TaskRecord, answer: str) -> Example:
    """A record in one wording: what an encoder reads, what the decoder reads, and what is learnt, the target.

    Lines are joined by `</s>`, and a newline in a value is one, too; an empty line is left out.

    Args:
        answer: one of the record's answers, or any of its options.

    Raises:
        UnusableRecord: an image or a clip is not there, or a value does not suit a filter of the template.
    """
    try:
        return _render(task, template, record, answer)
    except UnusableRecord:
        raise
    except DataError as error:
        raise UnusableRecord("missing_media", str(error)) from None
    except (LookupError, ValueError, TypeError) as error:
        where = f"{task.task}, {record.key}, template {template.id}"
        raise UnusableRecord("unusable_value", f"{where}: {error}") from None


def _render(task: TaskFile, template: Template, record: TaskRecord, answer: str) -> Example:
    values = {**record.fields, ANSWER: answer, OPTIONS: LIST_FILTERS["lines"](list(record.options))}
    parts: list[ExamplePart] = []
    for lines in template.all_spans:
        if parts:  # keeps this span apart from the one before
            parts.append(ExamplePart(""))
        parts += _span(task, lines, values)
    plain = _joined(filled_in(line, values, task.maps) for line in template.plain)
    if plain:
        parts.append(ExamplePart(PARAGRAPH + plain if parts else plain))
    target = _NEWLINES.sub(PARAGRAPH, filled_in(template.target, values, task.maps))
    return Example((*parts, ExamplePart(target, is_trained=True)))


def behind_demonstrations(demonstrations: Sequence[Example], example: Example) -> Example:
    """An example behind others, of which nothing is learnt; each is encoded by itself."""
    parts: list[ExamplePart] = []
    for demonstration in demonstrations:
        parts += (ExamplePart(p.content, p.modality, p.is_encoded) for p in demonstration.parts)
        parts.append(ExamplePart(PARAGRAPH))
    return Example((*parts, *example.parts))


def answer_alone(task: TaskFile, template: Template, record: TaskRecord, answer: str) -> Example:
    """The target behind the template's plain lines alone: how likely it is without the question.

    Raises:
        ConfigError: the plain lines name fields, so that they are no context of the answer alone.
        UnusableRecord: as `render`.
    """
    bare = template.model_copy(update={"span": (), "spans": ()})
    if not bare.plain or set(bare.fields()) - {ANSWER}:
        raise ConfigError(f"{task.task}: normalise: answer_context needs plain lines that name no field")
    return render(task, bare, record, answer)


def _span(task: TaskFile, lines: Iterable[Line], values: dict[str, Any]) -> list[ExamplePart]:
    """What one encoder reads: images and clips where they stand, and the text between them."""
    parts: list[ExamplePart] = []
    texts: list[str] = []
    for line in (*lines, None):
        if isinstance(line, str):
            texts.append(filled_in(line, values, task.maps))
            continue
        if text := _joined(texts):
            parts.append(ExamplePart(text, TEXT, is_encoded=True))
        texts = []
        if line is not None:
            ((modality, name),) = line.items()
            parts.append(ExamplePart(_media(values[name], name), modality, is_encoded=True))
    return parts


def _joined(lines: Iterable[str]) -> str:
    cleaned = (_NEWLINES.sub(PARAGRAPH, line.strip()) for line in lines)
    return PARAGRAPH.join(line for line in cleaned if line)


def _media(value: Any, name: str) -> bytes:
    """The bytes of an image or clip: a file, or a cell of parquet as mirrors of data sets have it."""
    if isinstance(value, MediaFile):
        return value.read()
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data
    raise DataError(f"the field {name} holds no image or clip")
