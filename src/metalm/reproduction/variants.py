"""What is made of real tasks for the arms: texts, other wordings, shuffled labels, no images."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from metalm.config.plain_files import read_yaml
from metalm.errors import ConfigError, DataError
from metalm.reproduction.groups import check_groups
from metalm.tasks.data_files import DataFiles
from metalm.tasks.filters import as_text
from metalm.tasks.mixture import lacking
from metalm.tasks.readers import read_records
from metalm.tasks.records import TaskData
from metalm.tasks.rendering import render
from metalm.tasks.task_file import load_task, placeholders

PILE_SET = "reproduction"
JSON_LINES = "jsonl"


def write_texts(tasks: Sequence[Path], data: Path, fields: Sequence[str], out: Path, seed: int) -> int:
    """The training side of tasks as Pile-like JSON Lines in a drawn order; how many texts there are.

    A text that stands in several records, such as a claim with two pieces of evidence, is there once.

    Args:
        fields: those of each record that are texts, a text for each.

    Raises:
        ConfigError: a task has no training side, or no such field.
        DataError: see `check_groups`.
    """
    found: dict[str, None] = {}
    for path in tasks:
        task = load_task(path)
        task.require_split("train")
        if unknown := [name for name in fields if name not in task.data.fields]:
            raise ConfigError(
                f"{path}: there is no field {unknown[0]!r}; the task has {', '.join(task.data.fields)}"
            )
        check_groups(task, data)
        for record in TaskData(task, data).records("train"):
            found |= dict.fromkeys(as_text(record.fields[name]) for name in fields)
    texts = list(found)
    random.Random(seed).shuffle(texts)
    lines = (json.dumps({"text": text, "meta": {"pile_set_name": PILE_SET}}) + "\n" for text in texts)
    _write(out, lines)
    return len(texts)


def write_worded(tasks: Sequence[Path], data: Path, out: Path, most: int) -> int:
    """Examples of the training side as they are worded, for a tokenizer to learn the words of.

    Args:
        most: of each task.

    Returns:
        How many there are.

    Raises:
        DataError: a task has no training side, or no wording for finetuning; see also `check_groups`.
    """
    texts = []
    for path in tasks:
        task = load_task(path)
        if what := lacking(task, "train", "first"):
            raise DataError(f"{path}: the task has {what}")
        check_groups(task, data)
        template = task.templates_for("finetuning")[0]
        for record in TaskData(task, data).records("train", most=most):
            parts = render(task, template, record, record.answers[0]).parts
            texts.append("".join(part.content for part in parts if isinstance(part.content, str)))
    lines = (json.dumps({"text": text, "meta": {"pile_set_name": PILE_SET}}) + "\n" for text in texts)
    _write(out, lines)
    return len(texts)


def write_encoded(path: Path, out: Path) -> None:
    """A task of which all but the answer is encoded, so that the decoder goes on from the last vector (PAPER
    section 6): `out/TASK.yaml`, on the same data.

    Raises:
        DataError: a wording has several spans.
    """
    content = read_yaml(path)
    for template in _templates(content):
        if "spans" in template:
            raise DataError(f"{path}: a wording has several spans, and what is behind them belongs to none")
        template["span"] = [*template.get("span", []), *template.pop("plain", [])]
    _write_task(out / path.name, content)


def write_shuffled(path: Path, data: Path, out: Path, seed: int) -> None:
    """A task with the training answers of other records: `out/TASK.yaml`, and its records in `out/TASK`.

    The other splits are the task's own, and images stay where they are.

    Raises:
        DataError: see `_write_dealt`.
    """
    task = load_task(path)
    _write_dealt(path, data, out, seed, split="train", field=task.answer)


def write_mismatched(path: Path, data: Path, out: Path, seed: int) -> None:
    """A task whose questions of the test side are asked about the images of other records.

    Raises:
        DataError: the task has no images, or one alone; see also `_write_dealt`.
    """
    task = load_task(path)
    if not task.data.media:
        raise DataError(f"{path}: the task has no images")
    ((field, _), *_) = placeholders(next(iter(task.data.media.values())))
    _write_dealt(path, data, out, seed, split="test", field=field, none_keeps_its_own=True)


def _write_dealt(
    path: Path,
    data: Path,
    out: Path,
    seed: int,
    *,
    split: str,
    field: str,
    none_keeps_its_own: bool = False,
) -> None:
    """A task in one split of which the values of a field are dealt among the records.

    Raises:
        ConfigError: there is no such split.
        DataError: the records are no JSON Lines, the field is made of their values by filters, or another
            split is held out of this one, and would be dealt, too; see also `check_groups`.
    """
    task = load_task(path)
    task.require_split(split)
    key = task.data.fields[field]
    if "|" in key or "." in key or "?" in key:
        raise DataError(
            f"{path}: {field} is {key!r}, and not a key of the records, whose values can be dealt"
        )
    if of_it := [name for name, held_out in task.data.hold_out.items() if held_out.of == split]:
        raise DataError(f"{path}: {of_it[0]} is held out of {split}: give it a file of its own")
    if task.data.reader != JSON_LINES:
        raise DataError(f"{path}: only tasks of JSON Lines can be shuffled")
    check_groups(task, data)
    folder, own = data / task.data.folder, out / task.task
    for name in task.data.files:
        records: list[Any] = list(read_records(task.data, DataFiles(folder, task.data.archive), name))
        if name == split:
            own_values = [record[key] for record in records]
            values = list(own_values)
            random.Random(seed).shuffle(values)
            if none_keeps_its_own:
                _trade(values, own_values, path)
            records = [{**record, key: value} for record, value in zip(records, values, strict=True)]
        _write(own / f"{name}.jsonl", (json.dumps(record) + "\n" for record in records))
    content = read_yaml(path)
    content["data"] |= {"folder": task.task, "files": {name: f"{name}.jsonl" for name in task.data.files}}
    if task.data.archive is not None:
        content["data"]["archive"] = str((folder / task.data.archive).absolute())
    if task.data.media:  # files that are not in the archive
        for file in folder.iterdir():
            if not (own / file.name).exists():
                (own / file.name).symlink_to(file.absolute())
    _write_task(out / path.name, content)


def _trade(values: list[Any], own: Sequence[Any], path: Path) -> None:
    """Where a record has got its own value, let it have another's, which may have its."""
    for at, value in enumerate(values):
        if value == own[at]:
            other = next((n for n, one in enumerate(values) if value not in (one, own[n])), None)
            if other is None:
                raise DataError(f"{path}: nearly all records have the same value {str(value)[:80]!r}")
            values[at], values[other] = values[other], value


def write_blind(path: Path, out: Path) -> None:
    """A task without its images, of which only the texts can be answered: `out/TASK.yaml`.

    Raises:
        DataError: the task has no images.
    """
    content = read_yaml(path)
    if not content["data"].pop("media", None):
        raise DataError(f"{path}: the task has no images")
    for template in _templates(content):
        if "spans" in template:
            template["spans"] = [_texts(lines) for lines in template["spans"] if _texts(lines)]
        else:
            template["span"] = _texts(template.get("span", []))
    _write_task(out / path.name, content)


def _templates(content: dict[str, Any]) -> list[dict[str, Any]]:
    """All wordings of a task file."""
    return [*content["templates"], *([content["icl"]] if "icl" in content else [])]


def _texts(lines: Sequence[Any]) -> list[str]:
    return [line for line in lines if isinstance(line, str)]


def _write_task(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def _write(path: Path, lines: Iterator[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    partial.replace(path)
