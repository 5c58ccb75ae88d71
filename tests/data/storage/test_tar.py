"""Members of archives as Python's tarfile sees them, in every format that it writes."""

from __future__ import annotations

import io
import tarfile
import zlib

import pytest

from metalm.data.storage.tar import HashedStream, Member, TarEnd, member_header, padding, scan_members

NAMES = ["a.txt", "folder/b.jpg", "d" * 90 + "/" + "e" * 90 + ".json", "größe.txt"]
TOO_LONG_FOR_USTAR = "n" * 120 + ".txt"


def archive(format: int, *, mtime: float = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        names = NAMES if format == tarfile.USTAR_FORMAT else [*NAMES, TOO_LONG_FOR_USTAR]
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 511 + number, mtime
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


def scanned(data: bytes) -> tuple[list[Member], TarEnd]:
    *members, end = scan_members(HashedStream(io.BytesIO(data)))
    assert isinstance(end, TarEnd)
    return members, end


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_names_offsets_and_sizes_are_those_of_tarfile(format: int, mtime: float) -> None:
    data = archive(format, mtime=mtime)
    members, end = scanned(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [
            (m.name, m.offset, m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read()))
            for m in tar
            if m.isreg()
        ]
    assert [tuple(member) for member in members] == expected
    assert end is TarEnd.CLOSED


def test_a_cut_archive_is_truncated_at_every_length() -> None:
    data = archive(tarfile.PAX_FORMAT)
    whole, _ = scanned(data)
    for length in range(0, whole[-1].end + 512, 100):
        members, end = scanned(data[:length])
        assert members == [member for member in whole if member.end <= length]
        assert end is TarEnd.TRUNCATED


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 5000])
def test_written_members_are_those_that_tarfile_and_the_scan_read(size: int) -> None:
    name, content = "0003-0000000012345.u16", bytes(range(256)) * 20
    content = content[:size]
    data = (member_header(name, size) + content + padding(size)) * 2 + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar.getmembers():
            assert (member.name, member.size, member.isreg(), member.mtime) == (name, size, True, 0)
            assert (member.mode, member.uid, member.uname) == (0o444, 0, "metalm")
            file = tar.extractfile(member)
            assert file is not None and file.read() == content
    members, end = scanned(data)
    assert [(member.name, member.size) for member in members] == [(name, size)] * 2
    assert end is TarEnd.CLOSED


@pytest.mark.parametrize("position", [0, 124, 150])
def test_a_damaged_header_ends_the_scan(position: int) -> None:
    data = bytearray(archive(tarfile.GNU_FORMAT))
    whole, _ = scanned(bytes(data))
    data[whole[1].header_offset + position] ^= 0x55
    members, end = scanned(bytes(data))
    assert members == whole[:1]
    assert end is TarEnd.DAMAGED


def test_a_stated_size_beyond_the_file_is_a_truncation_not_an_allocation() -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 5 << 30
    members, end = scanned(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert members == []
    assert end is TarEnd.TRUNCATED
