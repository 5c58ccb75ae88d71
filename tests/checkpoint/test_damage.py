"""What is verified is what is read: manifests, states and indices that come from outside."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.test_checkpoint import WHOLE, make_checkpoint
from metalm.checkpoint.folders import find_problems, is_whole
from metalm.checkpoint.format import STATES
from metalm.checkpoint.manifest import MANIFEST_NAME, read_manifest, record_file, write_manifest
from metalm.checkpoint.reader import CheckpointReader
from metalm.errors import CheckpointError
from mutations import mutate_bytes

SHA = "0" * 64
MUTATIONS = 800


def one_file(size: str, version: int = 1) -> str:
    """A manifest of one file."""
    return f'{{"version": {version}, "files": {{"state.json": {{"size": {size}, "sha256": "{SHA}"}}}}}}'


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and have the manifest agree, as somebody would who can write there."""
    (folder / name).write_bytes(content)
    files = read_manifest(folder)
    write_manifest(folder, {**files, name: record_file(folder / name)})


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    lanes = folder / "data" / "lanes_00000.json"
    lanes.parent.mkdir()
    lanes.write_text('{"0": "listed"}')
    rewrite(folder, "data/lanes_00000.json", lanes.read_bytes())
    (folder / "data" / "lanes_00099.json").write_text('{"0": "not listed"}')
    (folder / "aaa").mkdir()
    (folder / "aaa" / "index.json").write_bytes((folder / "decoder" / "index.json").read_bytes())
    (folder / "config.yaml").write_text("not: listed")
    reader = CheckpointReader(folder, verify=True)
    assert reader.lane_states() == {0: "listed"}
    assert reader.components() == ["decoder"]
    with pytest.raises(CheckpointError, match=r"has no config\.yaml in its manifest"):
        reader.path_of("config.yaml")


@pytest.mark.parametrize("name", ["state.json", "decoder/index.json", "decoder/rank_00003.safetensors"])
def test_a_file_that_is_needed_and_not_listed_is_an_error(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path)
    write_manifest(folder, {key: record for key, record in read_manifest(folder).items() if key != name})
    with pytest.raises(CheckpointError, match=f"has no {name} in its manifest"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "{}",
        '{"version": 1, "files": {}}',
        '{"version": 1}',
        one_file("2", version=2),
        one_file("-1"),
        one_file("1e400"),
        one_file("Infinity"),
        '{"version": 1, "files": {"state.json": {"size": 2, "sha256": "short"}}}',
        '{"version": 1, "files": ["state.json"]}',
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 10_000,
        "\ud800",
    ],
    ids=lambda content: content[:30],
)
def test_a_manifest_that_cannot_be_one_counts_as_damaged(tmp_path: Path, content: str) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / MANIFEST_NAME).write_bytes(content.encode(errors="surrogatepass"))
    assert not is_whole(folder)
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name", ["../state.json", "/etc/passwd", "decoder/../../x", "./state.json", "a//b", "", ".", "a\0b"]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path)
    record = {"size": 2, "sha256": SHA}
    (folder / MANIFEST_NAME).write_text(json.dumps({"version": 1, "files": {name: record}}))
    with pytest.raises(CheckpointError, match="is no file inside the checkpoint"):
        read_manifest(folder)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stand_in", [pipe, loop, Path.mkdir])
@pytest.mark.parametrize("name", [MANIFEST_NAME, "state.json", "decoder/rank_00000.safetensors"])
def test_what_is_no_file_counts_as_damaged_and_nobody_waits(
    tmp_path: Path, name: str, stand_in: Callable[[Path], None]
) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / name).unlink()
    stand_in(folder / name)
    assert len(find_problems(folder)) == 1
    with pytest.raises(CheckpointError):
        CheckpointReader(folder, verify=True)


def test_a_link_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    state = folder / "state.json"
    state.rename(tmp_path / "elsewhere.json")
    state.symlink_to(tmp_path / "elsewhere.json")
    assert find_problems(folder) == ["state.json lies outside the checkpoint"]


@pytest.mark.parametrize("name", [MANIFEST_NAME, "state.json"])
def test_what_may_not_be_read_counts_as_damaged(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests run as root, whom no mode keeps out."""
    folder = make_checkpoint(tmp_path)
    open_as_root = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return open_as_root(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: Permission denied"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**62, 2**62]},
        {"shape": [-8, -6]},
        {"shape": [0, 6]},
        {"shape": [1e300]},
        {"tensor_size": 10**12, "shape": [10**12, 6], "partition_stride": 1},
        {"partition_stride": 0},
        {"pieces": [{"file": "rank_00000.safetensors", "tensor_rank": 0, "start": 0, "size": 2**61}]},
        {"pieces": [{"file": "rank_00000.safetensors", "tensor_rank": -1, "start": 0, "size": 24}]},
        {"pieces": None},
        {"partition_dim": "Infinity"},
    ],
    ids=str,
)
@pytest.mark.timeout(60)
def test_an_index_of_impossible_sizes_is_refused_at_once(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = make_checkpoint(tmp_path)
    index = json.loads((folder / "decoder" / "index.json").read_text())
    index["parameters"]["w"] |= change
    rewrite(folder, "decoder/index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointError):
        CheckpointReader(folder, verify=True)


def test_an_index_that_wants_more_than_its_files_hold_is_refused(tmp_path: Path) -> None:
    """Else a reader would ask for that much memory."""
    folder = make_checkpoint(tmp_path)
    pieces = [
        {"file": "rank_00000.safetensors", "tensor_rank": rank, "start": 0, "size": 2**40} for rank in (0, 1)
    ]
    entry = {"shape": [2**41], "partition_dim": 0, "partition_stride": 1, "tensor_size": 2, "pieces": pieces}
    content = {"version": 1, "parameters": {"w": entry}}
    rewrite(folder, "decoder/index.json", json.dumps(content).encode())
    with pytest.raises(CheckpointError, match="its index places"):
        CheckpointReader(folder, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step"),
        ({"step": None}, "step"),
        ({"optimizer_steps": {}}, "of different components"),
        ({"optimizer_steps": {"decoder": float("nan")}}, "optimizer_steps"),
        ({"engine_counters": {"decoder": {"global_steps": 1}}}, "skipped_steps"),
        ({"topology": {"tensor": 0, "data": 1}}, "topology.tensor"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_state_of_another_schema_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = make_checkpoint(tmp_path)
    state = json.loads((folder / "state.json").read_text()) | change
    rewrite(folder, "state.json", json.dumps(state).encode())
    with pytest.raises(CheckpointError, match=f"is not the state of a run: .*{message}"):
        CheckpointReader(folder)


@pytest.mark.parametrize("agreeing", [False, True], ids=["damaged", "with a manifest that agrees"])
def test_mutated_checkpoints_are_refused_or_read_right(tmp_path: Path, agreeing: bool) -> None:
    """What is damaged is always found; what was changed together with its hash never ends in a trace."""
    folder = make_checkpoint(tmp_path)
    names = ["state.json", "decoder/index.json", "decoder/rank_00000.safetensors"]
    names += [] if agreeing else [MANIFEST_NAME]
    original = {name: (folder / name).read_bytes() for name in [*names, MANIFEST_NAME]}
    chance, refused = random.Random(13), 0
    for _ in range(MUTATIONS):
        name = chance.choice(names)
        content = mutate_bytes(original[name], chance)
        if agreeing:
            rewrite(folder, name, content)
        else:
            (folder / name).write_bytes(content)
        try:
            reader = CheckpointReader(folder, verify=True)
            found = [reader.read("decoder", "w", state) for state in STATES]
        except CheckpointError:
            refused += 1
        else:
            if not agreeing:
                assert content == original[name] or name == MANIFEST_NAME
                for number, tensor in enumerate(found):
                    assert torch.equal(tensor, WHOLE + number)
        for each, was in original.items():
            (folder / each).write_bytes(was)
    assert refused > MUTATIONS // 2
