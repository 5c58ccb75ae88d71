"""Rows of parquet files, a batch at a time.

A file is read by runs of row groups that hold about as much as a shard shall, by what its footer says. A page
of a column is in memory at a time, and of a text that stands in many rows one copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metalm.errors import ConfigError, DataError
from metalm.regular_files import open_regular

PARQUET_SUFFIX = ".parquet"
BATCH_BYTES = 1 << 20
"""Of rows that are read at once, by the mean of their group."""
MAX_BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20


class ParquetFile:
    """An open parquet file; to be used in a `with` statement.

    Attributes:
        columns: names of its columns without those that hold others; a dot stands before one within one.
        names: of its columns, those within others left out.
    """

    def __init__(self, path: Path, *, texts: Sequence[str] = ()) -> None:
        """
        Args:
            texts: columns of which a batch holds each text once.

        Raises:
            ConfigError: pyarrow is not installed.
            DataError: it cannot be read.
        """
        self.path = path
        try:
            from pyarrow import parquet
        except ImportError:
            raise ConfigError(f"{path} needs the package pyarrow: pip install 'metalm[parquet]'") from None
        try:
            open_regular(path).close()  # a pipe would be waited for
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        with self._damage("it is no parquet file that can be read"):
            self._metadata = parquet.read_metadata(path)
            schema = self._metadata.schema
            leaves = [schema.column(number) for number in range(len(schema))]
            self.columns = {leaf.path: number for number, leaf in enumerate(leaves)}
            self.names: list[str] = schema.to_arrow_schema().names
            self._file = parquet.ParquetFile(
                path,
                metadata=self._metadata,
                read_dictionary=[
                    leaf.path for leaf in leaves if leaf.path in texts and leaf.physical_type == "BYTE_ARRAY"
                ],
                pre_buffer=False,
                buffer_size=BUFFER_BYTES,
                page_checksum_verification=True,
            )

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def groups(self) -> list[RowGroup]:
        """All row groups, in their order."""
        found, first = [], 0
        with self._damage("its footer is damaged"):
            for number in range(self._metadata.num_row_groups):
                num_rows = self._metadata.row_group(number).num_rows
                if num_rows < 0:
                    raise ValueError(f"row group {number} has {num_rows} rows")
                found.append(RowGroup(number, first, num_rows))
                first += num_rows
        return found

    def column_bytes(self, column: str) -> np.ndarray:
        """Bytes [groups] int64 of a column before compression, by row group."""
        with self._damage("its footer is damaged"):
            sizes = [
                self._metadata.row_group(number).column(self.columns[column]).total_uncompressed_size
                for number in range(self._metadata.num_row_groups)
            ]
        return np.maximum(np.array(sizes, np.int64), 0)

    def batches(self, group: RowGroup, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """The rows of a group, as `pyarrow.RecordBatch` of about `BATCH_BYTES`.

        Args:
            columns: that are read; None: all.

        Raises:
            DataError: it is damaged.
        """
        with self._damage(f"row group {group.number} is damaged"):
            size = self._metadata.row_group(group.number).total_byte_size
            rows = BATCH_BYTES * group.num_rows // max(1, size)
            batches = self._file.iter_batches(
                batch_size=min(MAX_BATCH_ROWS, max(1, rows)),
                row_groups=[group.number],
                columns=None if columns is None else list(columns),
                use_threads=False,
            )
        num_read = 0
        while True:
            with self._damage(f"row group {group.number} is damaged"):
                batch = next(batches, None)
                num_read += 0 if batch is None else len(batch)
                if num_read > group.num_rows or (batch is None and num_read < group.num_rows):
                    raise ValueError(f"it has {num_read} rows, its footer states {group.num_rows}")
            if batch is None:
                return
            yield batch

    def rows(self, group: RowGroup, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any] | None]:
        """The rows of a group as plain values; None for one with a text that is not UTF-8.

        Args:
            group: of the file.
            columns: as of `batches`.

        Raises:
            DataError: it is damaged.
        """
        for batch in self.batches(group, columns):
            try:
                found = batch.to_pylist()
            except UnicodeDecodeError:
                found = [_plain_row(batch, number) for number in range(len(batch))]
            except (OverflowError, ValueError) as error:
                raise DataError(
                    f"cannot read {self.path}, row group {group.number} has what is no plain value: {error}; "
                    "leave columns out that are not needed"
                ) from None
            yield from found

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
            raise DataError(f"cannot read {self.path}, {what}: {error}") from error


def _plain_row(batch: Any, number: int) -> dict[str, Any] | None:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file: its number, its first row in the file, and how many it has."""

    number: int
    first_row: int
    num_rows: int


def runs_of_groups(sizes: np.ndarray, run_bytes: int) -> list[slice]:
    """Row groups in runs: a run has those that begin in one stretch of `run_bytes`.

    Args:
        sizes: [groups] int64, bytes.
    """
    if not len(sizes):
        return []
    stretches = (np.cumsum(sizes) - sizes) // run_bytes
    firsts = [0, *(np.flatnonzero(np.diff(stretches)) + 1).tolist(), len(sizes)]
    return [slice(first, end) for first, end in itertools.pairwise(firsts)]
