"""Chat files to shards of examples. The unit of work is a stretch of lines, or some thousand records."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from metalm.data.documents.chats import TrainedAnswers, chat_example
from metalm.data.documents.example import Example
from metalm.data.preparation.chat_records import turns_of
from metalm.data.preparation.example_shards import SHARD_BYTES, ExampleTask, prepare_examples
from metalm.data.preparation.jsonl import COMPRESSED_SUFFIXES, JsonLinesFile, is_compressed
from metalm.data.preparation.media_files import MediaFiles
from metalm.errors import BadSample, ConfigError, DataError, MetaLMError
from metalm.modalities import Convert

LINES_SUFFIX, ARRAY_SUFFIX, PARQUET_SUFFIX = ".jsonl", ".json", ".parquet"
STRETCH_BYTES = 32 << 20
"""Of a file of lines, for one task."""
RECORDS_PER_TASK = 4096
"""Of an array."""


class ChatForm(NamedTuple):
    """How records become examples."""

    media_root: Path
    train: TrainedAnswers

    def example(self, record: Any) -> Example | str:
        """The example of a record, or the cause of its absence."""
        try:
            return chat_example(turns_of(record, _open_files(self.media_root)), self.train)
        except BadSample as bad:
            return bad.cause
        except MetaLMError:
            raise
        except Exception:  # a record may hold anything anywhere
            return "bad_record"


@functools.lru_cache(maxsize=4)
def _open_files(root: Path) -> MediaFiles:
    return MediaFiles(root)


@dataclass(frozen=True)
class ChatLines:
    """A task: a stretch of a file of lines."""

    unit: str
    source: str
    form: ChatForm
    path: Path
    start: int
    end: int | None

    def examples(self) -> Iterator[tuple[float, Example | str]]:
        """Each example or its cause of absence, with the share of the task that is done."""
        end = self.path.stat().st_size if self.end is None else self.end
        with JsonLinesFile(self.path) as file:
            for _, line in file.lines(start=self.start, end=self.end):
                share = min(1.0, max(0.0, (file.position - self.start) / max(1, end - self.start)))
                if line is None:
                    yield share, "long_line"
                elif line.strip():
                    yield share, self._of_line(line)

    def _of_line(self, line: bytes) -> Example | str:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return "bad_json"
        return self.form.example(record)


@dataclass(frozen=True)
class ChatRecords:
    """A task: some records of an array."""

    unit: str
    source: str
    form: ChatForm
    records: tuple[Any, ...]

    def examples(self) -> Iterator[tuple[float, Example | str]]:
        """Each example or its cause of absence, with the share of the task that is done."""
        for number, record in enumerate(self.records, start=1):
            yield number / len(self.records), self.form.example(record)


@dataclass(frozen=True)
class ChatRows:
    """A task: a group of rows of a parquet file."""

    unit: str
    source: str
    form: ChatForm
    path: Path
    group: int

    def examples(self) -> Iterator[tuple[float, Example | str]]:
        """Each example or its cause of absence, with the share of the task that is done."""
        try:
            rows = _parquet(self.path).read_row_group(self.group).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise DataError(f"cannot read {self.path}, row group {self.group}: {error}") from error
        for number, row in enumerate(rows, start=1):
            yield number / len(rows), self.form.example(row)


def prepare_chats(
    inputs: Sequence[Path],
    out: Path,
    *,
    train: TrainedAnswers = "all",
    media_folder: Path | None = None,
    converts: Mapping[str, Convert],
    settings: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    first_number: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes shards of the examples of chat files, their index and a report: see `prepare_examples`.

    Args:
        inputs: `.jsonl` (also `.gz` and `.zst`), `.json` or `.parquet`; see `chat_records`.
        train: on all answers of a chat, or on the last one alone.
        media_folder: a folder or a tar that names of images and clips are looked for in; default: the folder
            of their file.
        settings: those of `converts`; with others, an interrupted call does not go on.
        first_number: of the first input, in names of shards, when inputs are prepared apart.

    Raises:
        ConfigError: options that contradict the folder, or a package that is not installed.
        DataError: an input cannot be read, or nothing was kept.
    """
    if not inputs:
        raise ConfigError("no input was given")
    tasks: list[ExampleTask] = []
    for number, path in enumerate(inputs, start=first_number):
        root = path.parent if media_folder is None else media_folder
        MediaFiles(root)  # what is not there shows here
        tasks += _tasks(number, path, ChatForm(root, train))
    plan = {
        "inputs": [path.name for path in inputs],
        "sizes": [path.stat().st_size for path in inputs],
        "train": train,
        **settings,
        "first_number": first_number,
    }
    return prepare_examples(
        tasks, out, plan=plan, converts=converts, shard_bytes=shard_bytes, processes=processes
    )


def _tasks(number: int, path: Path, form: ChatForm) -> Iterator[ExampleTask]:
    def unit(position: int) -> str:
        return f"{number:04d}-{position:05d}"

    if not path.is_file():
        raise DataError(f"{path} does not exist, or is no file")
    suffix = path.with_suffix("").suffix if is_compressed(path) else path.suffix
    if suffix == LINES_SUFFIX and is_compressed(path):
        yield ChatLines(unit(0), path.name, form, path, 0, None)
    elif suffix == LINES_SUFFIX:
        for position, start in enumerate(range(0, path.stat().st_size, STRETCH_BYTES)):
            yield ChatLines(unit(position), path.name, form, path, start, start + STRETCH_BYTES)
    elif path.suffix == ARRAY_SUFFIX:
        records = _array(path)
        for position, start in enumerate(range(0, len(records), RECORDS_PER_TASK)):
            chunk = tuple(records[start : start + RECORDS_PER_TASK])
            yield ChatRecords(unit(position), path.name, form, chunk)
    elif path.suffix == PARQUET_SUFFIX:
        for group in range(_parquet(path).num_row_groups):
            yield ChatRows(unit(group), path.name, form, path, group)
    else:
        ends = f"{LINES_SUFFIX} (also {', '.join(COMPRESSED_SUFFIXES)}), {ARRAY_SUFFIX} or {PARQUET_SUFFIX}"
        raise DataError(f"{path}: expected a file of chats that ends in {ends}")


def _array(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: expected an array of records, found {type(records).__name__}")
    return records


@functools.lru_cache(maxsize=4)
def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no parquet file that can be read: {error}") from error
