"""The files of a task's data as their owner distributes them: unpacked, or in an archive."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from metalm.errors import DataError

MAX_FILE_BYTES = 8 * 2**30
"""Of a member of an archive, and of all of a compressed tar, so that none can fill the memory or the disk."""
_UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)
"""What damaged or encrypted files raise."""
_BUFFER_BYTES = 1 << 16
_COPIED_BYTES = 1 << 20


class DataFiles:
    """A folder, and an archive in it for what is not unpacked."""

    def __init__(self, folder: Path, archive: str | None = None) -> None:
        """
        Raises:
            DataError: the folder is not there, or its archive is damaged.
        """
        if not folder.is_dir():
            raise DataError(f"{folder} is not there: put the dataset's files into it, or give --data")
        self.folder = folder
        self._archive = folder / archive if archive is not None else None

    def names(self, pattern: str) -> list[str]:
        """The files that a pattern names, sorted.

        Raises:
            DataError: there is none.
        """
        found = self._unpacked(pattern) or sorted(fnmatch.filter(self._members, pattern))
        if not found:
            place = f" or in {self._archive.name}" if self._archive and self._archive.exists() else ""
            raise DataError(f"{self.folder / pattern} is not there{place}")
        return found

    def open(self, name: str) -> IO[bytes]:
        """A file, to be read from its front; reading raises DataError as well.

        Raises:
            DataError: it cannot be read.
        """
        path = self.folder / name
        with _reading(path):
            if path.is_file():
                return _Checked.buffered(path.open("rb", buffering=0), path)
            if name in self._members:
                return _Checked.buffered(self._members[name](), path)
        raise DataError(f"{path} is not there")

    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            DataError: it cannot be read.
        """
        with self.open(name) as handle:
            return handle.read()

    def all_names(self, patterns: Sequence[str]) -> Iterator[str]:
        """The files of several patterns, in the order of these."""
        for pattern in patterns:
            yield from self.names(pattern)

    def digests(self, patterns: Sequence[str]) -> dict[str, str]:
        """SHA-256, hexadecimal, over names and contents of the files of each pattern; of those that are not
        unpacked, of the archive.

        Raises:
            DataError: a pattern names no file, and there is no archive; or a file cannot be read.
        """
        found: dict[str, str] = {}
        for pattern in patterns:
            names = self._unpacked(pattern)
            if not names and self._archive is not None and self._archive.is_file():
                names = [str(self._archive.relative_to(self.folder))]  # not unpacked, which may take long
            whole = hashlib.sha256()
            for name in names or self.names(pattern):
                path = self.folder / name
                with _reading(path):
                    about = path.stat()
                    whole.update(f"{name}\0{_digest(path, about.st_size, about.st_mtime_ns)}\n".encode())
            found[pattern] = whole.hexdigest()
        return found

    def _unpacked(self, pattern: str) -> list[str]:
        if ".." in Path(pattern).parts or Path(pattern).is_absolute():
            raise DataError(f"{pattern} is outside of {self.folder}")
        return sorted(
            str(path.relative_to(self.folder)) for path in self.folder.glob(pattern) if path.is_file()
        )

    @functools.cached_property
    def _members(self) -> dict[str, Callable[[], IO[bytes]]]:
        """By name, how each file in the archive is opened."""
        if self._archive is None or not self._archive.is_file():
            return {}
        try:
            if zipfile.is_zipfile(self._archive):
                packed = zipfile.ZipFile(self._archive)
                return {
                    info.filename: functools.partial(packed.open, info)
                    for info in packed.infolist()
                    if not info.is_dir() and info.file_size <= MAX_FILE_BYTES
                }
            tar = _quickly_read(tarfile.open(self._archive))  # noqa: SIM115 - read as long as this lives
            return {
                info.name.removeprefix("./"): functools.partial(_extract, tar, info)
                for info in tar
                if info.isfile() and info.size <= MAX_FILE_BYTES
            }
        except _UNREADABLE as error:
            raise DataError(f"{self._archive} is no zip or tar file: {error}") from None


class _Checked(io.RawIOBase):
    """A file whose damage shows when it is read."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path

    @classmethod
    def buffered(cls, file: IO[bytes], path: Path) -> IO[bytes]:
        """The file, so that DataError is raised where it cannot be read."""
        return io.BufferedReader(cls(file, path), _BUFFER_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _reading(self._path):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        with _reading(self._path):
            return self._file.read()

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from None


@functools.lru_cache(maxsize=1 << 16)
def _digest(path: Path, size: int, changed_ns: int) -> str:
    """Of a file's content, as long as its size and its time of change stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quickly_read(tar: tarfile.TarFile) -> tarfile.TarFile:
    """A tar file in which going back costs nothing: itself, or decompressed into a temporary file.

    In a compressed one each step back decompresses all from the front, for hours where files are many.

    Raises:
        DataError: it is too large to be decompressed.
    """
    compressed: Any = tar.fileobj
    if compressed is None or isinstance(compressed, io.BufferedReader):
        return tar
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - read as long as the tar file
    compressed.seek(0)
    left = MAX_FILE_BYTES
    while piece := compressed.read(_COPIED_BYTES):
        if (left := left - len(piece)) < 0:
            plain.close()
            tar.close()
            raise DataError(
                f"{tar.name!s} is more than {MAX_FILE_BYTES:,} bytes when it is decompressed: unpack it into "
                "its folder"
            )
        plain.write(piece)
    tar.close()
    plain.seek(0)
    return tarfile.open(fileobj=plain)


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    member = tar.extractfile(info)
    assert member is not None
    return member
