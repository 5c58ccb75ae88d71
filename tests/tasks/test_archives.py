"""Datasets that stay in their archives."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from metalm.errors import DataError
from metalm.tasks import data_files
from metalm.tasks.data_files import DataFiles
from metalm.tasks.readers.tables import read_csv, read_json, read_jsonl

MODES = ["w", "w:gz", "w:bz2", "w:xz"]


def packed(folder: Path, mode: str, contents: Mapping[str, bytes]) -> DataFiles:
    with tarfile.open(folder / "packed", mode) as tar:  # type: ignore[call-overload]
        for name, content in contents.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return DataFiles(folder, "packed")


@pytest.mark.parametrize("mode", MODES)
def test_members_of_a_tar_in_any_order_and_open_at_once(mode: str, tmp_path: Path) -> None:
    files = packed(tmp_path, mode, {name: name.encode() for name in ("b/2.txt", "a/1.txt", "b/1.txt")})
    assert files.names("*/*.txt") == ["a/1.txt", "b/1.txt", "b/2.txt"]
    opened = [files.open(name) for name in files.names("*/*.txt")]
    assert [handle.read(3) for handle in opened] == [b"a/1", b"b/1", b"b/2"]
    assert [handle.read() for handle in opened] == [b".txt"] * 3


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_compressed_tar_is_decompressed_once(mode: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    contents = {f"{number}.bin": draw.randbytes(20_000) for number in range(10)}
    files = packed(tmp_path, mode, contents)
    names = files.names("*.bin")
    (tmp_path / "packed").write_bytes(b"")  # so that nothing can be read from there again
    assert {name: files.read(name) for name in reversed(names)} == contents


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_compressed_tar_that_could_fill_the_disk_is_refused(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "MAX_FILE_BYTES", 50_000)
    files = packed(tmp_path, mode, {f"{number}.bin": bytes(20_000) for number in range(3)})
    with pytest.raises(
        DataError, match="packed is more than 50,000 bytes when it is decompressed: unpack it"
    ):
        files.names("*.bin")


def test_a_damaged_tar_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(bytes(range(256)) * 400)
    (tmp_path / "packed").write_bytes(whole[:-200])
    with pytest.raises(DataError, match="packed is no zip or tar file"):
        DataFiles(tmp_path, "packed").names("*.txt")


def test_a_damaged_member_of_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "one two three " * 100)
    content = bytearray((tmp_path / "packed").read_bytes())
    content[40:44] = b"\xff\xff\xff\xff"  # of the compressed text
    (tmp_path / "packed").write_bytes(content)
    with pytest.raises(DataError, match="a.txt cannot be read"):
        DataFiles(tmp_path, "packed").read("a.txt")
    for read in (read_jsonl, read_csv, read_json):
        with pytest.raises(DataError, match="a.txt cannot be read"):
            list(read(DataFiles(tmp_path, "packed"), ["a.txt"], "train"))


def test_digests_are_of_files_or_of_the_archive_which_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/all.tar.gz").write_bytes(b"no archive")
    (tmp_path / "train.csv").write_text("a,b\n")
    files = DataFiles(tmp_path, "packed/all.tar.gz")
    before = files.digests(["train.csv", "validation.csv"])
    assert list(before) == ["train.csv", "validation.csv"]
    assert files.digests(["train.csv", "validation.csv"]) == before
    (tmp_path / "train.csv").write_text("a,c\n")  # as long
    after = files.digests(["train.csv", "validation.csv"])
    assert after["train.csv"] != before["train.csv"] and after["validation.csv"] == before["validation.csv"]
    (tmp_path / "train.csv").rename(tmp_path / "trainings.csv")
    assert files.digests(["train*.csv"])["train*.csv"] != after["train.csv"]
    with pytest.raises(DataError, match="is not there"):
        DataFiles(tmp_path).digests(["validation.csv"])
