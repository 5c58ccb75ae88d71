"""Files of records, such as chats, in tasks: stretches of lines, thousands of an array, row groups."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from metalm.data.documents.example import Example
from metalm.data.preparation.example_shards import ExampleTask, TaskExample
from metalm.data.preparation.jsonl import COMPRESSED_SUFFIXES, JsonLinesFile, is_compressed
from metalm.data.preparation.parquet_rows import PARQUET_SUFFIX, ParquetFile, RowGroup
from metalm.data.preparation.tally import Place
from metalm.errors import DataError
from metalm.regular_files import read_regular

LINES_SUFFIX, ARRAY_SUFFIX = ".jsonl", ".json"
STRETCH_BYTES = 32 << 20
"""Of a file of lines, for one task."""
RECORDS_PER_TASK = 4096
"""Of an array."""


class RecordForm(Protocol):
    """How records become examples. It travels to processes."""

    def examples(self, record: Any) -> Iterable[Example | str]:
        """The examples of a record, and the causes of what is left out."""
        ...


@dataclass(frozen=True)
class _Lines:
    unit: str
    source: str
    form: RecordForm
    path: Path
    start: int
    end: int | None

    def examples(self) -> Iterator[TaskExample]:
        end = self.path.stat().st_size if self.end is None else self.end
        with JsonLinesFile(self.path) as file:
            for number, (_, line) in enumerate(file.lines(start=self.start, end=self.end), start=1):
                share = min(1.0, max(0.0, (file.position - self.start) / max(1, end - self.start)))
                place: Place = {"file": self.source, "line": number}
                for example in self._of_line(line):
                    yield TaskExample(share, example, place)

    def _of_line(self, line: bytes | None) -> Iterable[Example | str | None]:
        if line is None:
            return ["long_line"]
        if not line.strip():
            return [None]
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return ["bad_json"]
        return self.form.examples(record)


@dataclass(frozen=True)
class _Array:
    unit: str
    source: str
    form: RecordForm
    first: int
    records: tuple[Any, ...]

    def examples(self) -> Iterator[TaskExample]:
        for number, record in enumerate(self.records):
            place: Place = {"file": self.source, "record": self.first + number}
            for example in self.form.examples(record):
                yield TaskExample((number + 1) / len(self.records), example, place)


@dataclass(frozen=True)
class _Rows:
    unit: str
    source: str
    form: RecordForm
    path: Path
    group: RowGroup

    def examples(self) -> Iterator[TaskExample]:
        with ParquetFile(self.path) as file:
            for number, row in enumerate(file.rows(self.group)):
                place: Place = {"file": self.source, "row_group": self.group.number, "row": number}
                for example in ["invalid_unicode"] if row is None else self.form.examples(row):
                    share = (number + 1) / self.group.num_rows
                    yield TaskExample(share, example, place)


def record_tasks(number: int, path: Path, form: RecordForm) -> Iterator[ExampleTask]:
    """The tasks of a file.

    Args:
        number: of the file, in names of shards.

    Raises:
        ConfigError: a package is not installed.
        DataError: it cannot be read, or its form is unknown.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is no file")
    suffix = path.with_suffix("").suffix if is_compressed(path) else path.suffix
    if suffix == LINES_SUFFIX and is_compressed(path):
        yield _Lines(_unit(number, 0), path.name, form, path, 0, None)
    elif suffix == LINES_SUFFIX:
        for position, start in enumerate(range(0, path.stat().st_size, STRETCH_BYTES)):
            yield _Lines(_unit(number, position), path.name, form, path, start, start + STRETCH_BYTES)
    elif path.suffix == ARRAY_SUFFIX:
        records = _array(path)
        for position, start in enumerate(range(0, len(records), RECORDS_PER_TASK)):
            chunk = tuple(records[start : start + RECORDS_PER_TASK])
            yield _Array(_unit(number, position), path.name, form, start, chunk)
    elif path.suffix == PARQUET_SUFFIX:
        with ParquetFile(path) as file:
            groups = file.groups()
        for position, group in enumerate(groups):
            yield _Rows(_unit(number, position), path.name, form, path, group)
    else:
        ends = f"{LINES_SUFFIX} (also {', '.join(COMPRESSED_SUFFIXES)}), {ARRAY_SUFFIX} or {PARQUET_SUFFIX}"
        raise DataError(f"{path}: expected a file of records that ends in {ends}")


def _unit(number: int, position: int) -> str:
    return f"{number:04d}-{position:05d}"


def _array(path: Path) -> list[Any]:
    try:
        records = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: expected an array of records, found {type(records).__name__}")
    return records
