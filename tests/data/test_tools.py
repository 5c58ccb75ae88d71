"""The operators' tools, run as an operator does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metalm.data.checking import check_shards
from metalm.data.storage.index import open_index
from metalm.errors import DataError

REPOSITORY = Path(__file__).parents[2]


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_foreign_shards_are_indexed_and_checked(
    tmp_path: Path, tokenizer_folder: Path, write_shard: Callable[..., None], jpeg: Callable[..., bytes]
) -> None:
    for shard in range(2):
        samples = [{"jpg": jpeg((n, 0, 0)), "txt": b"fox", "json": b"{}"} for n in range(5)]
        write_shard(tmp_path / f"{shard}.tar", [*samples, {"jpg": b"no caption"}])
    done = run_tool("index_shards.py", tmp_path, "--kind", "image_text", "--processes", 1)
    assert done.returncode == 0, done.stderr
    assert "10 samples in 2 shards" in done.stdout
    assert "left out: 2 missing_caption" in done.stdout
    assert open_index(tmp_path).num_samples == 10

    arguments = ("check_shards.py", tmp_path, "--tokenizer", tokenizer_folder, "--processes", 2)
    done = run_tool(*arguments)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 shards are sound: 10 samples indexed, 10 decoded" in done.stdout

    path = tmp_path / "1.tar"
    content = bytearray(path.read_bytes())
    content[int(open_index(tmp_path).records["main_offset"][0]) + 20] ^= 0xFF
    path.write_bytes(content)
    done = run_tool(*arguments)
    assert done.returncode == 65
    assert f"{path}: sha256 is" in done.stdout
    assert "1 of 2 shards are sound" in done.stdout
    assert all(line.startswith("metalm: checking") for line in done.stderr.splitlines())


def test_samples_that_do_not_decode_are_named_and_images_need_no_tokenizer(
    tmp_path: Path, write_shard: Callable[..., None], jpeg: Callable[..., bytes]
) -> None:
    write_shard(tmp_path / "a.tar", [{"jpg": jpeg((1, 2, 3)), "txt": b"a"}, {"jpg": b"x", "txt": b"a"}])
    assert run_tool("index_shards.py", tmp_path, "--kind", "image_text", "--processes", 1).returncode == 0
    done = run_tool("check_shards.py", tmp_path, "--processes", 1)
    assert done.returncode == 65
    assert f"{tmp_path}/a.tar: sample 1: undecodable_image" in done.stdout


def test_text_is_not_checked_without_its_tokenizer(
    tmp_path: Path, tokenizer_folder: Path, write_shard: Callable[..., None]
) -> None:
    write_shard(tmp_path / "a.tar", [{"txt": b"a"}])
    index = ("index_shards.py", tmp_path, "--kind", "text", "--tokenizer", tokenizer_folder, "--processes", 1)
    assert run_tool(*index).returncode == 0
    with pytest.raises(DataError, match="holds text: the tokenizer of these shards is needed"):
        check_shards(tmp_path, None)


def test_a_folder_without_shards_is_one_message(tmp_path: Path) -> None:
    done = run_tool("index_shards.py", tmp_path, "--kind", "text")
    assert done.returncode == 65
    assert done.stderr.strip().splitlines()[-1].startswith("index_shards.py: error:")
    assert "Traceback" not in done.stderr


def test_the_benchmark_measures_every_loader_that_is_installed(tmp_path: Path) -> None:
    arguments = ("--text-mb", 0.5, "--photographs", 2, "--rounds", 1, "--out", tmp_path / "bench.json")
    done = run_tool("bench_data.py", *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    for what in ("samples/s", "packed rows, Mtokens/s", "photographs of 256 pixels to 224, /s"):
        assert results[what]["metalm"] > 0
        assert results[what]["webdataset"] > 0
    assert len(results["restore at 1%, 50%, 99% (s)"]["metalm"]) == 3
