"""Documents of texts and images between them to shards of examples: see `interleaved_records`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalm.config.model_schema import TEXT
from metalm.data.documents.example import Example
from metalm.data.preparation.document_cutting import DocumentCutter
from metalm.data.preparation.example_shards import SHARD_BYTES, ExampleTask, prepare_examples
from metalm.data.preparation.folder import CONTENTS, digest_of, named_folder
from metalm.data.preparation.interleaved_records import IMAGE, document_of
from metalm.data.preparation.media_files import open_media_files, tar_of
from metalm.data.preparation.pair_sources import table_rows
from metalm.data.preparation.record_tasks import record_tasks
from metalm.data.tokenizer import load_tokenizer
from metalm.errors import BadSample, ConfigError, DataError, MetaLMError
from metalm.modalities import Convert
from metalm.progress import Phase


@dataclass(frozen=True)
class RowSize:
    """How long a document may be: longer ones are cut into pieces."""

    tokenizer: Path
    """Folder or tokenizer.json."""
    positions: int
    """Of a row: `data.sequence_length`."""
    image_positions: int
    """Vectors of an image in its encoder."""


@dataclass(frozen=True)
class InterleavedForm:
    """How records become examples."""

    media_root: Path
    image_table: Path | None
    row_size: RowSize | None
    convert: Convert
    """What checks an image and makes its member, before a document is cut: its texts depend on it."""

    def examples(self, record: Any) -> list[Example | str]:
        """The pieces of a record's document, and the causes of what is left out."""
        try:
            paths = {} if self.image_table is None else _image_paths(self.image_table)
            document, left_out = document_of(record, open_media_files(self.media_root), paths, self.convert)
            return [*left_out, *self._pieces(document)]
        except BadSample as bad:
            return [bad.cause]
        except MetaLMError:
            raise
        except Exception:  # a record may hold anything anywhere
            return ["bad_record"]

    def _pieces(self, document: Example) -> list[Example | str]:
        if not document.parts:
            return ["empty_document"]
        if all(part.modality == TEXT for part in document.parts):
            return ["no_image"]
        if self.row_size is None:
            return [document]
        try:
            return list(_cutter(self.row_size).cut(document))
        except BadSample as bad:
            return [bad.cause]


@functools.lru_cache(maxsize=4)
def _cutter(row_size: RowSize) -> DocumentCutter:
    return DocumentCutter(load_tokenizer(row_size.tokenizer), row_size.positions, row_size.image_positions)


_TABLES = (".csv", ".tsv", ".jsonl")


@functools.lru_cache(maxsize=4)
def _image_paths(table: Path) -> dict[str, str]:
    """By link.

    Raises:
        DataError: the table cannot be read, lacks a column, or has no rows.
    """
    if table.suffix not in _TABLES:
        raise DataError(f"{table} is no table of images: expected one of {', '.join(_TABLES)}")
    try:
        if paths := {str(row["url"]): str(row["path"]) for _, row in table_rows(table)}:
            return paths
        raise DataError(f"{table} has no rows")
    except KeyError as error:
        raise DataError(f"{table} has no column {error}: it needs `url` and `path`") from None
    except OSError as error:
        raise DataError(f"cannot read {table}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8: {error}") from error


def prepare_interleaved(
    inputs: Sequence[Path],
    out: Path,
    *,
    media_folder: Path | None = None,
    image_table: Path | None = None,
    row_size: RowSize | None = None,
    converts: Mapping[str, Convert],
    settings: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    first_number: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes shards of documents with images, their index and a report: see `prepare_examples`.

    Args:
        inputs: `.jsonl` (also compressed), `.json` or `.parquet`; see `interleaved_records`.
        media_folder: a folder or a tar that names of images are looked for in; default: the folder of their
            file.
        image_table: .csv, .tsv or .jsonl with the `url` of an image and its `path` in the folder.
        row_size: longer documents are cut into pieces; None: training passes over what is longer than a row.
        settings: those of `converts`; with others, an interrupted call does not go on.
        first_number: of the first input, in names of shards, when inputs are prepared apart.

    Raises:
        ConfigError: options that contradict the folder or each other, or a package that is not installed.
        DataError: an input cannot be read, or nothing was kept.
    """
    if not inputs:
        raise ConfigError("no input was given")
    if row_size is not None and row_size.image_positions + 2 > row_size.positions:
        raise ConfigError(
            f"an image has {row_size.image_positions} positions, a row {row_size.positions} with <s> and </d>"
        )
    if image_table is not None:
        _image_paths(image_table)
    fingerprint = None if row_size is None else load_tokenizer(row_size.tokenizer).fingerprint
    tasks: list[ExampleTask] = []
    for number, path in enumerate(Phase.over("listing the inputs", inputs, "inputs"), start=first_number):
        root = path.parent if media_folder is None else media_folder
        open_media_files(root)  # what is not there shows here
        tasks += record_tasks(number, path, InterleavedForm(root, image_table, row_size, converts[IMAGE]))
    plan = {
        "form": "interleaved",
        "inputs": [[path.name, path.stat().st_size] for path in inputs],
        CONTENTS: [digest_of(path) for path in (*inputs, *tar_of(media_folder))],
        "image_table": None if image_table is None else hashlib.sha256(image_table.read_bytes()).hexdigest(),
        **named_folder(media_folder),
        "row_size": row_size and [fingerprint, row_size.positions, row_size.image_positions],
        **settings,
        "first_number": first_number,
    }
    return prepare_examples(
        tasks, out, plan=plan, converts=converts, shard_bytes=shard_bytes, processes=processes
    )
