"""Files of rows or of JSON objects."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence

from metalm.errors import DataError
from metalm.tasks.data_files import DataFiles
from metalm.tasks.places import NOTHING, values_at
from metalm.tasks.readers.reader import BadRecord, Record, expected, load_json

_ROWS_AT_ONCE = 1024


def read_csv(
    files: DataFiles,
    names: Sequence[str],
    split: str,
    *,
    header: Sequence[str] | None = None,
    delimiter: str = ",",
    quoted: bool = True,
    encoding: str = "utf-8-sig",
) -> Iterator[Record | BadRecord]:
    """Rows of cells.

    Args:
        header: names of the columns, of a file without; default: its first row.
        quoted: quotes around cells are no part of them.
    """
    csv.field_size_limit(sys.maxsize)
    for name in names:
        with files.open(name) as handle:
            text = io.TextIOWrapper(handle, encoding=encoding, newline="")
            rows = csv.reader(
                text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            )
            columns = list(header) if header is not None else None
            try:
                for row in rows:
                    if columns is None:
                        columns = row
                        if len(set(columns)) < len(columns):
                            raise expected(
                                files, name, f"columns of different names, not {', '.join(columns)}"
                            )
                    elif len(row) == len(columns):
                        yield dict(zip(columns, row, strict=True))
                    elif row:
                        yield BadRecord("wrong_number_of_columns", f"{name}:{rows.line_num}")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{files.folder / name} is not in {encoding} ({error.reason}): name its own in the task, "
                    "such as `settings: {encoding: latin-1}`"
                ) from None
            except csv.Error as error:
                raise DataError(f"{files.folder / name}:{rows.line_num}: {error}") from None


def read_tsv(
    files: DataFiles,
    names: Sequence[str],
    split: str,
    *,
    header: Sequence[str] | None = None,
    encoding: str = "utf-8-sig",
) -> Iterator[Record | BadRecord]:
    """Rows of cells between tabs, in which a quote is a character like any other."""
    return read_csv(files, names, split, header=header, delimiter="\t", quoted=False, encoding=encoding)


def read_json(
    files: DataFiles, names: Sequence[str], split: str, *, at: str = "*"
) -> Iterator[Record | BadRecord]:
    """Objects in a JSON file.

    Args:
        at: where they are, such as `data.*`.
    """
    for name in names:
        found = values_at(load_json(files, name), at)
        if found is NOTHING or not isinstance(found, list):
            raise expected(files, name, f"a list at {at}")
        for number, record in enumerate(found):
            yield record if isinstance(record, dict) else BadRecord("no_object", f"{name}:{number}")


def read_jsonl(files: DataFiles, names: Sequence[str], split: str) -> Iterator[Record | BadRecord]:
    """A JSON object in each line."""
    for name in names:
        with files.open(name) as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                yield record if isinstance(record, dict) else BadRecord("bad_json", f"{name}:{number}")


def read_parquet(files: DataFiles, names: Sequence[str], split: str) -> Iterator[Record | BadRecord]:
    """The rows of parquet files, as mirrors of data sets have them."""
    import pyarrow
    from pyarrow import parquet

    for name in names:
        try:
            with files.open(name) as handle:
                table = parquet.ParquetFile(pyarrow.BufferReader(handle.read()))
                for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{files.folder / name} is no parquet file: {error}") from None
