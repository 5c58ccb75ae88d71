"""Texts of parquet files. A stretch is a run of row groups whose texts are about as long as it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalm.data.preparation.parquet_rows import ParquetFile, runs_of_groups
from metalm.data.preparation.tally import Place
from metalm.data.preparation.text_document import (
    MAX_TEXT_BYTES,
    Document,
    TextFields,
    TextRecord,
    make_document,
)
from metalm.errors import DataError


@dataclass(frozen=True)
class ParquetText:
    """Rows of a parquet file."""

    path: Path
    size: int
    fields: TextFields
    is_stream = False

    def num_stretches(self, stretch_bytes: int) -> int:
        with self._open() as file:
            return len(runs_of_groups(file.column_bytes(self.fields.text), stretch_bytes))

    def stretches(self, stretch_bytes: int, number: int) -> Iterator[tuple[int, Iterator[TextRecord]]]:
        with self._open() as file:
            yield number, self._records(file, stretch_bytes, number)

    def _records(self, file: ParquetFile, stretch_bytes: int, number: int) -> Iterator[TextRecord]:
        groups = file.groups()[runs_of_groups(file.column_bytes(self.fields.text), stretch_bytes)[number]]
        columns = [name for name in (self.fields.text, self.fields.subset) if name in file.columns]
        num_rows = sum(group.num_rows for group in groups)
        num_read = 0
        for group in groups:
            row = 0
            for batch in file.batches(group, columns):
                subsets = _scalars(batch, self.fields.subset) if len(columns) > 1 else itertools.repeat(None)
                for text, subset in zip(_scalars(batch, self.fields.text), subsets, strict=False):
                    num_read += 1
                    place: Place = {"row_group": group.number, "row": row}
                    document = _document_of_scalars(text, subset)
                    yield TextRecord(group.first_row + row, place, document, num_read / num_rows)
                    row += 1

    def _open(self) -> ParquetFile:
        file = ParquetFile(self.path, texts=(self.fields.text, self.fields.subset))
        if self.fields.text not in file.columns:
            raise DataError(
                f"{self.path} has no column {self.fields.text!r}, but {', '.join(file.columns)}: name that "
                "of the texts with --text-field"
            )
        return file


def _scalars(batch: Any, path: str) -> Iterator[Any]:
    """The values of a column, each as a scalar of pyarrow; None: what it would lie in is null."""
    name, *keys = [path] if path in batch.schema.names else path.split(".")
    for scalar in batch.column(name):
        for key in keys:
            scalar = scalar[key] if scalar is not None and scalar.is_valid else None
        yield scalar


def _document_of_scalars(text: Any, subset: Any) -> Document | str:
    content = _bytes_of(text)
    if content is not None and len(content) > MAX_TEXT_BYTES:
        return "too_long"
    name = _bytes_of(subset)
    try:
        return make_document(
            None if content is None else str(content, "utf-8"), None if name is None else str(name, "utf-8")
        )
    except UnicodeDecodeError:
        return "invalid_unicode"


def _bytes_of(scalar: Any) -> memoryview | None:
    """Of a text or bytes; None: it is neither, or null."""
    if scalar is None or not scalar.is_valid:
        return None
    value = getattr(scalar, "value", scalar)  # of a column that holds each text once
    return memoryview(value.as_buffer()) if hasattr(value, "as_buffer") else None
