"""Members of package files, read without unpacking the rest: wheels and zips, tar files, Debian packages."""

from __future__ import annotations

import functools
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from metalm.errors import DataError

Wanted = Callable[[str], bool]
"""Whether a member of that name is read."""

_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60
_AR_SIZE = slice(48, 58)


def read_members(file: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wanted members of an archive, in its order.

    Raises:
        DataError: it is damaged, or not a single member is wanted.
    """
    found = False
    try:
        with _opened(file) as members:
            for name, read in members:
                if wanted(name):
                    found = True
                    yield name, read()
    except _UNREADABLE as error:
        raise DataError(
            f"{file} is no archive that can be read: {error}; delete it and get it again"
        ) from None
    if not found:
        raise DataError(f"{file} has none of the files that are looked for: get the package again")


def read_tar(content: bytes, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wanted members of a tar file that lies in another archive."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        yield from ((name, read()) for name, read in _of_tar(tar) if wanted(name))


Members = Iterator[tuple[str, Callable[[], bytes]]]


@contextmanager
def _opened(file: Path) -> Iterator[Members]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            infos = [info for info in packed.infolist() if not info.is_dir()]
            yield ((info.filename, functools.partial(packed.read, info)) for info in infos)
        return
    with file.open("rb") as handle:
        if handle.read(len(_AR_MAGIC)) == _AR_MAGIC:
            _go_to_data(handle)
        else:
            handle.seek(0)
        with tarfile.open(fileobj=handle, mode="r|*") as tar:
            yield _of_tar(tar)


def _of_tar(tar: tarfile.TarFile) -> Members:
    for info in tar:
        if info.isfile():
            member = cast(IO[bytes], tar.extractfile(info))
            yield info.name.removeprefix("./"), member.read


def _go_to_data(handle: IO[bytes]) -> None:
    """Go to the tar file with the content of a Debian package, which is an `ar` archive (deb(5))."""
    while header := handle.read(_AR_HEADER_BYTES):
        if len(header) < _AR_HEADER_BYTES:
            break
        if header.startswith(b"data.tar"):
            return
        size = int(header[_AR_SIZE])
        handle.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("it holds no data.tar")
