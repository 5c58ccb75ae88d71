"""Lines of JSON Lines files, plain or compressed, and their documents, in constant memory."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metalm.data.preparation.text_document import MAX_TEXT_BYTES, PILE_FIELDS, Document, TextFields
from metalm.errors import ConfigError, DataError
from metalm.regular_files import open_regular

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2")
BUFFER_BYTES = 1 << 20
COMPRESSED_CHUNK_BYTES = 1 << 16


def is_compressed(path: Path) -> bool:
    """Whether the file can only be read from its beginning."""
    return path.suffix in COMPRESSED_SUFFIXES


def check_files(paths: Iterable[Path]) -> None:
    """Raises DataError unless all of these are files that can be opened."""
    problems = []
    for path in paths:
        try:
            open_regular(path).close()
        except FileNotFoundError:
            problems.append(f"no such input file: {path}")
        except OSError as error:
            problems.append(f"cannot read {path}: {error.strerror}")
    if problems:
        raise DataError("; ".join(problems))


class JsonLinesFile:
    """A file of lines, plain or compressed, open for reading; to be used in a `with` statement.

    Raises:
        DataError: here or while reading: the file cannot be read, or is damaged.
        ConfigError: it is compressed by zstd and the package `zstandard` is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        self._content: BinaryIO = self._file
        if path.suffix == ".gz":
            self._content = io.BufferedReader(gzip.GzipFile(fileobj=self._file), BUFFER_BYTES)
        elif path.suffix == ".bz2":
            self._content = io.BufferedReader(bz2.BZ2File(self._file), BUFFER_BYTES)
        elif path.suffix == ".zst":
            try:
                self._content = io.BufferedReader(_ZstdStream(self._file), BUFFER_BYTES)
            except ImportError as error:
                raise ConfigError(f"{path} needs the package zstandard: install metalm[zstd]") from error

    def __enter__(self) -> JsonLinesFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        """How far the file itself has been read, in bytes as stored."""
        return self._file.tell()

    def lines(
        self, *, start: int = 0, end: int | None = None, max_line_bytes: int = MAX_TEXT_BYTES
    ) -> Iterator[tuple[int, bytes | None]]:
        """Lines that begin in [start, end) of the decompressed content, each with the offset where it
        begins; None stands for a line that is too long. To be called once; only a plain file can be
        entered at a `start`.
        """
        offset = 0
        if start:
            self._file.seek(start - 1)
            offset = start - 1 + sum(len(chunk) for chunk in self._one_line(max_line_bytes))
        while end is None or offset < end:
            line: bytes | None = None
            size = 0
            for chunk in self._one_line(max_line_bytes):
                line = chunk if size == 0 else None
                size += len(chunk)
            if size == 0:
                return
            yield offset, line
            offset += size

    def _one_line(self, max_line_bytes: int) -> Iterator[bytes]:
        """The next line in chunks of at most `max_line_bytes`; one chunk for all but unusual lines."""
        try:
            while chunk := self._content.readline(max_line_bytes):
                yield chunk
                if chunk.endswith(b"\n"):
                    return
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(f"{self.path} is damaged after byte {self.position}: {error}") from error


class _ZstdStream(io.RawIOBase):
    """The content of a .zst file of one or more frames. Unlike zstandard's own reader, it notices an
    end in the middle of a frame."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._zstandard = zstandard
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._compressed = self._compressed or self._file.read(COMPRESSED_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._content = memoryview(self._frame.decompress(self._compressed))
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size


def parse_document(line: bytes | None, fields: TextFields = PILE_FIELDS) -> Document | str | None:
    """The document of a line, or why there is none, as it is counted; None of a blank line."""
    if line is None:
        return "too_long"
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "invalid_unicode"
    except (ValueError, RecursionError):
        return "invalid_json"
    return fields.document_of(record) if isinstance(record, dict) else "invalid_json"
