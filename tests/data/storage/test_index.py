"""The index: what it finds in shards, what it leaves out and counts, and what it refuses."""

from __future__ import annotations

import hashlib
import io
import json
import runpy
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from metalm.data.sources import open_source
from metalm.data.storage import index as index_module
from metalm.data.storage import shard_scan
from metalm.data.storage.index import build_index, open_index
from metalm.data.storage.shard_scan import FORMATS, RECORD, scan_shard
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BusyError, ConfigError, DataError
from metalm.modalities import MODALITIES
from metalm.modalities.image import Image, decode_image
from permissions import as_users_are

FINGERPRINT = "f" * 64


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar with exactly these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_every_format_has_a_code_and_keeps_it_when_a_modality_gets_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = ("u16", "u32", "txt", "jpg", "png", "webp", "wav", "flac", "ogg", "json", "mp3")
    assert FORMATS[: len(known)] == known
    assert {name for one in MODALITIES.values() for name in one.formats.values()} <= {*FORMATS}
    monkeypatch.setattr(Image, "formats", {**Image.formats, "gif": "gif"})
    assert runpy.run_path(shard_scan.__file__)["FORMATS"][: len(known)] == known


def test_members_are_where_the_index_says(tmp_path: Path, write_shard: Callable[..., None]) -> None:
    bodies = [np.arange(n + 1, dtype="<u2").tobytes() for n in range(20)]
    write_shard(tmp_path / "b.tar", [{"u16": body, "json": b"{}"} for body in bodies[:12]])
    write_shard(tmp_path / "c.tar", [{"txt": b"not read", "u16": body} for body in bodies[12:]])
    index = build_index(tmp_path, kind="text", tokenizer_fingerprint=FINGERPRINT)
    assert [shard.num_samples for shard in index.shards] == [12, 8]
    assert index.num_samples == 20
    assert index.num_tokens == sum(range(1, 21))
    assert index.token_dtype == "uint16"
    assert index.tokenizer_fingerprint == FINGERPRINT
    found = []
    for number, record in enumerate(index.records):
        data = (tmp_path / ("b.tar" if number < 12 else "c.tar")).read_bytes()
        start = int(record["offset"]) + int(record["main_offset"])
        found.append(data[start : start + int(record["main_size"])])
    assert found == bodies


def test_checksums_are_those_of_the_files(text_source: Callable[..., Path]) -> None:
    folder = text_source([3, 4])
    for shard in open_index(folder).shards:
        assert shard.sha256 == hashlib.sha256((folder / shard.name).read_bytes()).hexdigest()


def test_processes_give_the_same_index(text_source: Callable[..., Path]) -> None:
    folder = text_source([3, 4, 5])
    before = (folder / "index.json").read_bytes()
    build_index(
        folder, kind="text", tokenizer_fingerprint=open_index(folder).tokenizer_fingerprint, processes=2
    )
    assert (folder / "index.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".tar") == [
        json.loads(before)["records"],
        "index.json",
    ]


def test_two_that_index_one_folder_do_not_write_one_file(
    text_source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text_source([3, 4])
    fingerprint = open_index(folder).tokenizer_fingerprint
    before = (folder / "index.json").read_bytes()
    scan, seen = index_module._scan_file, []

    def beside(*arguments: Any, **options: Any) -> Any:
        if not seen:
            seen.append(True)
            with pytest.raises(BusyError, match="is being indexed by another process: wait for it"):
                build_index(folder, kind="text", tokenizer_fingerprint=fingerprint)
        return scan(*arguments, **options)

    monkeypatch.setattr(index_module, "_scan_file", beside)
    build_index(folder, kind="text", tokenizer_fingerprint=fingerprint)
    assert seen
    assert (folder / "index.json").read_bytes() == before
    assert not list(folder.glob("*.partial"))


def test_a_folder_that_cannot_be_written_is_said_before_it_is_read(
    text_source: Callable[..., Path], tmp_path: Path
) -> None:
    folder = text_source([3])
    fingerprint = open_index(folder).tokenizer_fingerprint
    folder.chmod(0o555)
    with as_users_are(), pytest.raises(ConfigError, match="index it where it may be written"):
        build_index(folder, kind="text", tokenizer_fingerprint=fingerprint)
    folder.chmod(0o755)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="index it where it may be written"):
        build_index(tmp_path / "file/x", kind="text", url="pipe:cat {shard}", shard_names=["a.tar"])


def test_shards_of_img2dataset_are_read(
    tmp_path: Path, jpeg: Callable[..., bytes], tokenizer: Tokenizer
) -> None:
    with webdataset.TarWriter(str(tmp_path / "00000.tar"), encoder=False) as writer:
        for number in range(3):
            writer.write(
                {
                    "__key__": f"00000000{number}",
                    "jpg": jpeg((number, 0, 0)),
                    "json": json.dumps(
                        {"caption": f"a fox {number}", "url": "x", "status": "success"}
                    ).encode(),
                    "txt": f"a fox {number}".encode(),
                }
            )
    (tmp_path / "00000.parquet").write_bytes(b"")
    (tmp_path / "00000_stats.json").write_text("{}")
    build_index(tmp_path, kind="image_text")
    source = open_source("web", tmp_path, tokenizer)
    locations = source.index.locate(np.arange(3))
    assert [source.captions(location) for location in locations] == [[f"a fox {n}"] for n in range(3)]
    assert decode_image(source.main_member(locations[0])).shape == (20, 24, 3)


def test_shards_that_the_index_names_are_read_by_plain_webdataset(text_source: Callable[..., Path]) -> None:
    folder = text_source([6])
    read = [
        np.frombuffer(sample["u16"], "<u2")
        for sample in webdataset.WebDataset(str(folder / "text-00000.tar"), shardshuffle=False)
    ]
    assert sum(map(len, read)) == open_index(folder).num_tokens


LEFT_OUT = {
    "missing_caption": [("1.jpg", b"i")],
    "missing_image": [("1.txt", b"caption")],
    "several_images": [("1.jpg", b"i"), ("1.png", b"i"), ("1.txt", b"c")],
    "duplicate_member": [("1.jpg", b"i"), ("1.jpg", b"i"), ("1.txt", b"c")],
    "unsafe_name": [("../../1.jpg", b"i"), ("../../1.txt", b"c")],
    "oversize_member": [("1.jpg", b"i" * 5000), ("1.txt", b"c")],
}


@pytest.mark.parametrize("cause", LEFT_OUT)
def test_pairs_that_cannot_be_used_are_counted_by_cause(tmp_path: Path, cause: str) -> None:
    good = [("0.JPEG", b"i"), ("0.txt", b"c"), ("2.webp", b"i"), ("2.json", b"{}")]
    write_members(tmp_path / "a.tar", good[:2] + LEFT_OUT[cause] + good[2:])
    shard, records = scan_shard(tmp_path / "a.tar", "image_text", max_member_bytes=4096)
    assert shard.skipped == {cause: 1}
    assert len(records) == shard.num_samples == 2


@pytest.mark.parametrize(
    ("cause", "members"),
    {
        "partial_token": [("1.u16", b"abc")],
        "empty_text": [("1.txt", b"")],
        "missing_text": [("1.json", b"{}")],
        "unsafe_name": [("/1.txt", b"a")],
    }.items(),
)
def test_texts_that_cannot_be_used_are_counted_by_cause(
    tmp_path: Path, cause: str, members: list[tuple[str, bytes]]
) -> None:
    write_members(tmp_path / "a.tar", [("0.txt", b"a"), *members, ("2.txt", b"a")])
    shard, records = scan_shard(tmp_path / "a.tar", "text")
    assert shard.skipped == {cause: 1}
    assert len(records) == 2


def test_truncated_damaged_and_empty_shards_are_counted(
    tmp_path: Path, write_shard: Callable[..., None]
) -> None:
    samples = [{"jpg": b"i" * 700, "txt": b"c"} for _ in range(5)]
    for name in ("a", "b", "c", "d"):
        write_shard(tmp_path / f"{name}.tar", samples)
    whole = (tmp_path / "a.tar").read_bytes()
    third = int(scan_shard(tmp_path / "a.tar", "image_text")[1]["offset"][2])
    (tmp_path / "b.tar").write_bytes(whole[: third + 1100])
    (tmp_path / "c.tar").write_bytes(whole[:third] + b"\xff" * 512 + whole[third + 512 :])
    (tmp_path / "d.tar").write_bytes(b"")
    index = build_index(tmp_path, kind="image_text")
    assert [(shard.num_samples, shard.skipped) for shard in index.shards] == [
        (5, {}),
        # What precedes the cut may lack a member, so it goes too.
        (1, {"truncated_tar": 1}),
        (1, {"damaged_tar": 1}),
        (0, {"empty_shard": 1}),
    ]
    assert index.skipped == {"damaged_tar": 1, "empty_shard": 1, "truncated_tar": 1}
    assert open_index(tmp_path).num_samples == 7


@pytest.mark.parametrize(
    ("size", "stored", "skipped"),
    [
        (300 << 20, True, {"empty_text": 1, "oversize_member": 1}),
        (5 * 10**9, False, {"truncated_tar": 1}),
    ],
)
def test_a_huge_member_is_left_out_and_never_held_in_memory(
    tmp_path: Path, size: int, stored: bool, skipped: dict[str, int]
) -> None:
    shard = tmp_path / "a.tar"
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as tar:
        tar.addfile(member := tarfile.TarInfo("1.txt"), io.BytesIO())
        member.name, member.size = "2.txt", 3
        tar.addfile(member, io.BytesIO(b"fox"))
    with shard.open("wb") as file:
        large = tarfile.TarInfo("0.txt")
        large.size = size
        file.write(large.tobuf())
        if stored:
            file.seek(size, io.SEEK_CUR)  # a hole, which takes no room on the disk
        file.write(good.getvalue())
    tracemalloc.start()
    entry, records = scan_shard(shard, "text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert entry.skipped == skipped
    assert entry.size == shard.stat().st_size
    assert records["main_size"].tolist() == ([3] if stored else [])
    assert peak < 16 << 20


def refused(folder: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_index(folder)


def test_folders_without_a_usable_sample_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        build_index(tmp_path / "none", kind="text")
    with pytest.raises(DataError, match=r"holds no \*.tar shard"):
        build_index(tmp_path, kind="text")
    write_members(tmp_path / "a.tar", [("0.jpg", b"i")])
    with pytest.raises(DataError, match=r"no usable image_text sample.*'missing_caption': 1"):
        build_index(tmp_path, kind="image_text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_token_members_need_one_size_and_a_tokenizer(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("0.u16", b"ab")])
    with pytest.raises(DataError, match=r"name the tokenizer .* by --tokenizer"):
        build_index(tmp_path, kind="text")
    write_members(tmp_path / "b.tar", [("0.u32", b"abcd")])
    with pytest.raises(DataError, match=r"holds \.u16 and \.u32"):
        build_index(tmp_path, kind="text", tokenizer_fingerprint=FINGERPRINT)


def test_what_does_not_fit_its_index_is_refused(text_source: Callable[..., Path]) -> None:
    folder = text_source([3, 4])
    shard, index = folder / "text-00001.tar", folder / "index.json"
    size = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(b"more")
    refused(folder, f"shard {shard} has {size + 4} bytes, its index states {size}")
    shard.unlink()
    refused(folder, f"shard {shard} is in the index but cannot be read")
    assert open_index(folder, check_sizes=False).num_samples == 7
    content = index.read_text()
    index.write_text(content.replace('"version": 2', '"version": 1'))
    refused(folder, "has version 1, this program reads version 2")
    index.write_text(content[: len(content) // 2])
    refused(folder, "cannot be used")
    index.unlink()
    refused(folder, r"has no index.json: write one with tools/index_shards.py")
    refused(folder / "none", "does not exist")


def test_records_that_were_cut_are_refused(text_source: Callable[..., Path]) -> None:
    folder = text_source([3])
    (records,) = folder.glob("index-*.records")
    content = records.read_bytes()
    records.write_bytes(content[: 2 * RECORD.itemsize])
    refused(folder, "states 3 samples and has 2 records")
    records.write_bytes(content[:70])
    refused(folder, "cannot be used")
    records.unlink()
    refused(folder, "cannot be used")


def test_another_tokenizer_is_refused_and_both_sides_are_named(
    text_source: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = text_source([3])
    document = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**document, "tokenizer_fingerprint": FINGERPRINT}))
    with pytest.raises(DataError, match=f"{FINGERPRINT[:16]}.*{tokenizer.fingerprint[:16]}"):
        open_source("a", folder, tokenizer)


def test_compressed_shards_are_named_as_passed_over(
    tmp_path: Path, write_shard: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(tmp_path / "a.tar", [{"txt": b"fox"}])
    for name in ("b.tar.gz", "c.tar.zst", "d.tgz", "e.tar.bz2"):
        (tmp_path / name).write_bytes(b"")
    assert build_index(tmp_path, kind="text").num_samples == 1
    [message] = caplog.messages
    assert "4 compressed shards are passed over (b.tar.gz, c.tar.zst, d.tgz, ...): unpack them" in message
