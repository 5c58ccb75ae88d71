"""Images and clips that records name: files of a folder, members of a tar, or data URIs."""

from __future__ import annotations

import base64
import binascii
import functools
import stat
from pathlib import Path
from urllib.parse import unquote_to_bytes

from metalm.data.storage.shard_scan import MAX_MEMBER_BYTES
from metalm.data.storage.tar import HashedStream, Member, scan_members
from metalm.errors import BadSample, DataError

_DATA_SCHEME = "data:"
_REMOTE_SCHEMES = ("http://", "https://", "ftp://", "s3://", "gs://")


class MediaFiles:
    """What names of images and clips stand for. Made in each process: a tar's members are listed once."""

    def __init__(self, root: Path) -> None:
        """
        Args:
            root: a folder, or a tar file.

        Raises:
            DataError: there is neither, or the tar cannot be read.
        """
        self._root = root
        self._members: dict[str, Member] | None = None
        if root.is_dir():
            return
        if root.exists() and not root.is_file():  # a pipe would be waited for
            raise DataError(f"{root} is neither a folder of images and clips nor a tar of them")
        try:
            with root.open("rb", buffering=0) as file:
                found = [one for one in scan_members(HashedStream(file)) if isinstance(one, Member)]
        except OSError as error:
            raise DataError(
                f"{root} is neither a folder of images and clips nor a tar of them: {error.strerror}"
            ) from error
        if not found:
            raise DataError(f"{root} is no tar of images and clips: it has no member that can be read")
        self._members = {member.name.removeprefix("./"): member for member in found}

    def read(self, name: str, modality: str) -> bytes:
        """The bytes of a file.

        Args:
            name: its path, its member's name, or a data URI with all of it.
            modality: for the cause.

        Raises:
            BadSample: `remote_`, `bad_data_uri_`, `outside_`, `missing_`, `oversize_` or `unreadable_` and
                the modality.
        """
        if name.startswith(_DATA_SCHEME):
            return _inline(name, modality)
        if name.startswith(_REMOTE_SCHEMES):
            raise BadSample(f"remote_{modality}")
        name = name.removeprefix("file://")
        try:
            return (
                self._from_folder(name, modality) if self._members is None else self._member(name, modality)
            )
        except FileNotFoundError:
            raise BadSample(f"missing_{modality}") from None
        except (OSError, ValueError):  # a path that no file can have is a ValueError
            raise BadSample(f"unreadable_{modality}") from None

    def _from_folder(self, name: str, modality: str) -> bytes:
        path = (self._root / name).resolve()
        if not path.is_relative_to(self._root.resolve()):
            raise BadSample(f"outside_{modality}")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise BadSample(f"unreadable_{modality}")
        if status.st_size > MAX_MEMBER_BYTES:
            raise BadSample(f"oversize_{modality}")
        return path.read_bytes()

    def _member(self, name: str, modality: str) -> bytes:
        assert self._members is not None
        member = self._members.get(name.removeprefix("./"))
        if member is None:
            raise BadSample(f"missing_{modality}")
        if member.size > MAX_MEMBER_BYTES:
            raise BadSample(f"oversize_{modality}")
        with self._root.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


@functools.lru_cache(maxsize=4)
def open_media_files(root: Path) -> MediaFiles:
    """Those of a folder or a tar, opened once in a process.

    Raises:
        DataError: as `MediaFiles`.
    """
    return MediaFiles(root)


def tar_of(root: Path | None) -> list[Path]:
    """The tar that holds the images and clips, if it is one that is named."""
    return [] if root is None or root.is_dir() else [root]


def _inline(uri: str, modality: str) -> bytes:
    head, comma, content = uri.partition(",")
    try:
        if comma and head.endswith(";base64"):
            return base64.b64decode(content, validate=True)
        if comma:
            return unquote_to_bytes(content)
    except (binascii.Error, ValueError):
        pass
    raise BadSample(f"bad_data_uri_{modality}")
