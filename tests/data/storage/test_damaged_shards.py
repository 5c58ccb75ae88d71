"""Damage behind right headers, and indices that point elsewhere: found at the first reading, by name."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metalm.data.sources import Source, open_source
from metalm.data.storage.index import build_index
from metalm.data.storage.shard_scan import RECORD, record_checksums
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BadSample, DataError
from mutations import mutate_bytes, mutate_value

NUM_SAMPLES = 12
MUTATIONS = 1200

Samples = list[tuple[list[str], bytes]]


@pytest.fixture
def folder(tmp_path: Path, write_shard: Callable[..., None]) -> Path:
    """Pairs of all forms in two shards; content of different lengths, and some of equal ones."""
    path = tmp_path / "pairs"
    path.mkdir()
    for shard in range(2):
        samples = []
        for number in range(shard * 6, shard * 6 + 6):
            sample = {"jpg": bytes([number]) * (700 + number % 3)}
            if number % 2:
                sample["txt"] = f"fox {number:02d}".encode()
            if number % 3:
                sample["json"] = json.dumps({"captions": [f"dog {number:02d}"]}).encode()
            if len(sample) == 1:
                sample["txt"] = f"cat {number:02d}".encode()
            samples.append(sample)
        write_shard(path / f"{shard}.tar", samples)
    build_index(path, kind="image_text")
    return path


def read_all(folder: Path, tokenizer: Tokenizer) -> Samples:
    source = open_source("pairs", folder, tokenizer)
    try:
        return [read_one(source, number) for number in range(source.index.num_samples)]
    finally:
        source.reader.close()


def read_one(source: Source, number: int) -> tuple[list[str], bytes]:
    (location,) = source.index.locate(np.array([number]))
    return source.captions(location), bytes(source.main_member(location))


def records_of(folder: Path) -> tuple[Path, np.ndarray]:
    (path,) = folder.glob("index-*.records")
    return path, np.fromfile(path, RECORD)


def test_every_flipped_byte_of_a_member_is_named_with_shard_and_fix(
    folder: Path, tokenizer: Tokenizer
) -> None:
    expected = read_all(folder, tokenizer)
    _, records = records_of(folder)
    shard, content = folder / "1.tar", (folder / "1.tar").read_bytes()
    for number, record in enumerate(records[6:], 6):
        for member in ("main", "caption", "json"):
            size = int(record[f"{member}_size"])
            for at in {0, size // 2, size - 1} if size else ():
                place = int(record["offset"]) + int(record[f"{member}_offset"]) + at
                shard.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
                with pytest.raises(
                    DataError, match=rf"shard {shard} is damaged.*sample {number}.*copy it anew"
                ):
                    read_all(folder, tokenizer)
    shard.write_bytes(content)
    assert read_all(folder, tokenizer) == expected


def exchange(field: str) -> Callable[[np.ndarray], None]:
    def change(records: np.ndarray) -> None:
        records[field][[1, 3]] = records[field][[3, 1]]

    return change


def assign(field: str, value: int, number: int = 3) -> Callable[[np.ndarray], None]:
    def change(records: np.ndarray) -> None:
        records[field][number] = value

    return change


def caption_as_description(records: np.ndarray) -> None:
    records["json_offset"][3], records["json_size"][3] = (
        records["caption_offset"][3],
        records["caption_size"][3],
    )


@pytest.mark.parametrize("agreeing", [False, True], ids=["damaged", "with checksums that agree"])
@pytest.mark.parametrize(
    "change",
    [
        *(exchange(field) for field in ("offset", "size")),
        *(assign("offset", value) for value in (0, 512, 10_240, 10**6, 2**63, 2**64 - 512, 1)),
        *(assign("size", value) for value in (0, 512, 2**32 - 1)),
        *(assign("main_size", value) for value in (2**31, 2**32 - 1)),
        *(assign("main_offset", value) for value in (0, 1, 256, 2**32 - 512)),
        *(assign("caption_offset", value) for value in (0, 100, 512, 2**31)),
        *(assign("format", value) for value in (0, 2, 99, 255)),
        *(assign("json_size", value) for value in (1, 2**32 - 1)),
        caption_as_description,
    ],
)
def test_records_that_point_elsewhere_are_refused(
    folder: Path, tokenizer: Tokenizer, change: Callable[[np.ndarray], None], agreeing: bool
) -> None:
    """By their place and the headers there, even if they were written so."""
    path, records = records_of(folder)
    before = records.copy()
    records["checksum"] ^= record_checksums(records)
    change(records)
    if agreeing:
        records["checksum"] ^= record_checksums(records)
    else:
        records["checksum"] = before["checksum"]
    assert (records != before).any()
    path.write_bytes(records.tobytes())
    with pytest.raises(DataError, match="index the folder again"):
        read_all(folder, tokenizer)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["index.json", "records", "0.tar"])
def test_what_is_no_file_is_refused_at_once(folder: Path, tokenizer: Tokenizer, name: str) -> None:
    path = records_of(folder)[0] if name == "records" else folder / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=path.name):
        read_all(folder, tokenizer)
    if name == "0.tar":
        with pytest.raises(DataError, match=r"0\.tar cannot be read: it is no regular file"):
            build_index(folder, kind="image_text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 11}, "11 samples, 12 in its shards"),
        ({"num_samples": -1}, "num_samples"),
        ({"num_tokens": 1e400}, "num_tokens"),
        ({"kind": "video"}, "is no kind of shards"),
        ({"records": "../x.records"}, "records"),
        ({"records": "/etc/passwd"}, "records"),
        ({"shards": []}, "12 samples, 0 in its shards"),
        ({"shards": None}, "shards"),
        ({"token_dtype": "uint16"}, "go together"),
        ({"kind": "text"}, "no sample can have"),
    ],
    ids=str,
)
def test_an_index_that_contradicts_itself_is_refused(
    folder: Path, tokenizer: Tokenizer, change: dict[str, Any], message: str
) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        read_all(folder, tokenizer)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"version": ' + "9" * 5000 + "}", "\x80", "[]", "null", ""]
)
def test_what_is_no_json_object_is_refused(folder: Path, tokenizer: Tokenizer, content: str) -> None:
    (folder / "index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match="index again|index the folder again"):
        read_all(folder, tokenizer)


@pytest.mark.parametrize("name", ["../0.tar", "a/0.tar", "", "..", "0\n.tar", "a\0b"])
def test_shards_that_are_not_beside_the_index_are_refused(
    folder: Path, tokenizer: Tokenizer, name: str
) -> None:
    path = folder / "index.json"
    document = json.loads(path.read_text())
    document["shards"][0]["name"] = name
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="is no file beside the index"):
        read_all(folder, tokenizer)


def test_no_mutation_of_shards_or_index_gives_other_samples(folder: Path, tokenizer: Tokenizer) -> None:
    """Each is refused by name, or what is read is what was written."""
    expected = read_all(folder, tokenizer)
    records, _ = records_of(folder)
    original = {path: path.read_bytes() for path in (records, folder / "index.json", folder / "0.tar")}
    document = json.loads(original[folder / "index.json"])
    chance, refused = random.Random(5), 0
    for number in range(MUTATIONS):
        path = list(original)[number % 3]
        if path.suffix == ".json" and number % 2:
            path.write_text(json.dumps(mutate_value(document, chance)))
        else:
            content = mutate_bytes(original[path], chance)
            if path.suffix != ".json":  # of the size that is stated, else that alone would be seen
                content = content[: len(original[path])].ljust(len(original[path]), b"\0")
            path.write_bytes(content)
        try:
            found = read_all(folder, tokenizer)
        except (DataError, BadSample):
            refused += 1
        else:
            assert found == expected or found == expected[: len(found)]
        path.write_bytes(original[path])
    assert refused > MUTATIONS // 2


@pytest.mark.parametrize(
    ("ids", "cause"),
    [
        ([9, 2], "control_token"),
        ([0], "control_token"),
        ([9, 3, 9], "control_token"),
        ([4, 9], "control_token"),
        ([9, 1, 1, 9], None),
        ([9, 299, 60_000], "token_out_of_range"),
    ],
)
def test_ids_that_no_text_has_make_a_sample_bad(
    tmp_path: Path, write_shard: Callable[..., None], tokenizer: Tokenizer, ids: list[int], cause: str | None
) -> None:
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    write_shard(tmp_path / "a.tar", [{"u16": np.array(ids, "<u2").tobytes()}])
    build_index(tmp_path, kind="text", tokenizer_fingerprint=tokenizer.fingerprint)
    source = open_source("text", tmp_path, tokenizer)
    (location,) = source.index.locate(np.array([0]))
    if cause is None:
        assert source.token_ids(location).tolist() == ids
    else:
        with pytest.raises(BadSample, match=cause):
            source.token_ids(location)
    shutil.rmtree(tmp_path)
