"""Member headers of a tar file as plain numbers, without unpacking anything; and headers to write.

A shard is scanned once, when it is indexed. Only what shards hold in practice is understood (ustar, GNU
and PAX names and sizes); everything else is stepped over. A damaged header ends the scan: what follows
it cannot be trusted. Headers are written here because Python's tarfile, which webdataset's writer uses,
takes longer for one than the tokenizer for a page of text.
"""

from __future__ import annotations

import enum
import hashlib
import zlib
from collections.abc import Collection, Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
_MAX_PAX_BYTES = 1 << 20
_MAX_PAX_DIGITS = 20
_PIECE_BYTES = 1 << 20
_WHOLE_NAME = 90
"""Longer names may be cut in the header itself, and stand whole in front of it."""


# name 100, mode 8, user 8, group 8, size 12, time 12, checksum 8, type 1, link 100, magic and version 8, ...
_PLAIN_HEADER = b"".join(
    (
        bytes(100),
        b"0000444\0" + b"0000000\0" * 2,
        bytes(11) + b"\0" + b"00000000000\0" + b" " * 8 + b"0",
        bytes(100),
        b"ustar\x0000" + b"metalm".ljust(32, b"\0") * 2 + b"0000000\0" * 2,
    )
).ljust(BLOCK, b"\0")
_PLAIN_CHECKSUM = sum(_PLAIN_HEADER)


class Readable(Protocol):
    """A file, or anything that is read from its front."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


class HashedStream:
    """Reads a stream forwards in large pieces, and keeps the size and the sha256 of all it has seen."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._piece = b""
        self._at = 0
        self.size = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        found = self._piece[self._at : self._at + size]
        self._at += len(found)
        while len(found) < size and self._fill():
            more = self._piece[: size - len(found)]
            self._at = len(more)
            found += more
        return found

    def skip(self, size: int) -> int | None:
        """Passes over the next `size` bytes and gives their crc32; None if there are fewer."""
        checksum, left = 0, size
        while True:
            found = memoryview(self._piece)[self._at : self._at + left]
            checksum = zlib.crc32(found, checksum)
            self._at += len(found)
            left -= len(found)
            if not left:
                return checksum
            if not self._fill():
                return None

    def finish(self) -> str:
        """Reads on to the end: the sha256 of everything, in hex."""
        while self._fill():
            pass
        return self._digest.hexdigest()

    def _fill(self) -> bool:
        self._piece, self._at = self._file.read(_PIECE_BYTES), 0
        self._digest.update(self._piece)
        self.size += len(self._piece)
        return bool(self._piece)


class Member(NamedTuple):
    """One regular file: where its first header starts, where its bytes lie, how many, and their crc32."""

    name: str
    header_offset: int
    offset: int
    size: int
    checksum: int

    @property
    def end(self) -> int:
        """Where the next header starts."""
        return self.offset + _padded(self.size)


class TarEnd(enum.Enum):
    """How a scan ended: the archive was closed, cut off, or holds something that is no header."""

    CLOSED = "closed"
    TRUNCATED = "truncated_tar"
    DAMAGED = "damaged_tar"


class BytesStream:
    """Reads bytes forwards, as `HashedStream` does a file."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._at = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end."""
        found = bytes(self._content[self._at : self._at + size])
        self._at += len(found)
        return found

    def skip(self, size: int) -> int | None:
        """Passes over the next `size` bytes and gives their crc32; None if there are fewer."""
        found = self._content[self._at : self._at + size]
        self._at += size
        return zlib.crc32(found) if len(found) == size else None


def scan_members(stream: HashedStream | BytesStream) -> Iterator[Member | TarEnd]:
    """The regular files of a tar archive in order, and last of all how the scan ended."""
    position = entry_start = 0
    long_name: str | None = None
    long_size: int | None = None
    while len(header := stream.read(BLOCK)) == BLOCK:
        if header[0] == 0 and header.count(0) == BLOCK:
            yield TarEnd.CLOSED
            return
        size = parse_size(header)
        if size is None or not _checksum_holds(header):
            yield TarEnd.DAMAGED
            return
        kind, offset = header[156:157], position + BLOCK
        if kind in b"xgLK":
            if size > _MAX_PAX_BYTES:
                yield TarEnd.DAMAGED
                return
            body = stream.read(_padded(size))[:size]
            if kind == b"L":
                long_name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                path, pax_size = _parse_pax(body)
                long_name = path if path is not None else long_name
                long_size = pax_size if pax_size is not None else long_size
            position = offset + _padded(size)
            continue
        size = size if long_size is None else long_size
        checksum = stream.skip(size)
        if checksum is None or stream.skip(_padded(size) - size) is None:
            break
        member = Member(long_name or _short_name(header), entry_start, offset, size, checksum)
        position = entry_start = member.end
        long_name, long_size = None, None
        if kind in b"0\0":
            yield member
    yield TarEnd.TRUNCATED


def member_header(name: str, size: int) -> bytes:
    """The ustar header of a regular file of ours: read-only, of no time and no user.

    Args:
        name: at most 100 ASCII characters.
        size: below 8 GiB.
    """
    encoded, digits = name.encode("ascii"), b"%011o" % size
    assert len(encoded) <= 100 and len(digits) == 11
    checksum = _PLAIN_CHECKSUM + sum(encoded) + sum(digits)
    parts = [encoded.ljust(100, b"\0"), _PLAIN_HEADER[100:124], digits, _PLAIN_HEADER[135:148]]
    return b"".join([*parts, b"%06o\0 " % checksum, _PLAIN_HEADER[156:]])


def padding(size: int) -> bytes:
    """What follows the content of a member, up to the next header."""
    return bytes(-size % BLOCK)


def is_header_of(header: bytes, size: int, suffixes: Collection[str]) -> bool:
    """Whether 512 bytes are the header of a regular file of a size whose name ends in one of the suffixes."""
    if len(header) != BLOCK or parse_size(header) != size or not _checksum_holds(header):
        return False
    if header[156:157] not in b"0\0":
        return False
    name = header[:100].partition(b"\0")[0]
    suffix = name.rpartition(b"/")[2].partition(b".")[2]
    return len(name) >= _WHOLE_NAME or suffix.decode("utf-8", "replace").lower() in suffixes


def parse_size(header: bytes) -> int | None:
    """The size field of a member header, octal or base-256; None if it is neither."""
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _parse_octal(field.strip(b" \0") or b"0")


def _checksum_holds(header: bytes) -> bool:
    stated = _parse_octal(header[148:156].strip(b" \0"))
    if stated is None:
        return False
    # The sum of all bytes, of which the field itself counts as blanks, by the fastest way: the lower half of
    # adler32 is 1 and the sum, modulo a prime.
    expected = 1 + stated - 8 * 0x20 + sum(header[148:156])
    return zlib.adler32(header) & 0xFFFF == expected % 65521


def _parse_octal(digits: bytes) -> int | None:
    """`int` alone would take signs and underscores, too."""
    if not digits.isdigit():
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _parse_pax(body: bytes) -> tuple[str | None, int | None]:
    path, size = None, None
    while body:
        length_text, _, _ = body[:_MAX_PAX_DIGITS].partition(b" ")
        if not length_text.isdigit() or not 0 < int(length_text) <= len(body):
            break
        key, _, value = body[len(length_text) + 1 : int(length_text) - 1].partition(b"=")
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < _MAX_PAX_DIGITS:
            size = int(value)
        body = body[int(length_text) :]
    return path, size


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
