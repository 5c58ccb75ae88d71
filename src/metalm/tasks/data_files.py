"""The files of a task's data as their owner distributes them: unpacked, or in an archive."""

from __future__ import annotations

import fnmatch
import functools
import io
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from metalm.errors import DataError

MAX_FILE_BYTES = 8 * 2**30
"""Of a member of an archive, so that none can fill the memory or the disk."""
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
        """A file, to be read from its front.

        Raises:
            DataError: it cannot be read.
        """
        path = self.folder / name
        try:
            if path.is_file():
                return path.open("rb")
            if name in self._members:
                return self._members[name]()
        except _UNREADABLE as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        raise DataError(f"{path} is not there")

    def read(self, name: str) -> bytes:
        """All of a file.

        Raises:
            DataError: it cannot be read.
        """
        with self.open(name) as handle:
            try:
                return handle.read()
            except _UNREADABLE as error:
                raise DataError(f"{self.folder / name} cannot be read: {error}") from None

    def all_names(self, patterns: Sequence[str]) -> Iterator[str]:
        """The files of several patterns, in the order of these."""
        for pattern in patterns:
            yield from self.names(pattern)

    def sizes(self, patterns: Sequence[str]) -> dict[str, int]:
        """Bytes of the files of several patterns by name; of those that are not unpacked, of the archive.

        Raises:
            DataError: a pattern names no file, and there is no archive.
        """
        found: dict[str, int] = {}
        for pattern in patterns:
            names = self._unpacked(pattern)
            if not names and self._archive is not None and self._archive.is_file():
                names = [str(self._archive.relative_to(self.folder))]  # not opened, which may take long
            found |= {name: (self.folder / name).stat().st_size for name in names or self.names(pattern)}
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


def _quickly_read(tar: tarfile.TarFile) -> tarfile.TarFile:
    """A tar file in which going back costs nothing: itself, or decompressed into a temporary file.

    In a compressed one each step back decompresses all from the front, for hours where files are many.
    """
    compressed: Any = tar.fileobj
    if compressed is None or isinstance(compressed, io.BufferedReader):
        return tar
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - read as long as the tar file
    compressed.seek(0)
    shutil.copyfileobj(compressed, plain)
    tar.close()
    plain.seek(0)
    return tarfile.open(fileobj=plain)


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    member = tar.extractfile(info)
    assert member is not None
    return member
