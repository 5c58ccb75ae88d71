"""Checkpoints made by hand: what a reader puts together, and what it refuses."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metalm.checkpoint.folders import find_checkpoint, prune_checkpoints
from metalm.checkpoint.format import STATES, ParameterIndex, Piece, piece_name, rank_file, write_index
from metalm.checkpoint.inspection import compare_checkpoints, describe_checkpoint
from metalm.checkpoint.manifest import publish, record_file, write_manifest
from metalm.checkpoint.names import list_checkpoints, step_folder
from metalm.checkpoint.reader import CheckpointReader
from metalm.checkpoint.writer import write_tensors
from metalm.errors import CheckpointError

WHOLE = torch.arange(48, dtype=torch.float32).reshape(8, 6)


def make_checkpoint(folder: Path, step: int = 1, **changes: object) -> Path:
    """A parameter of two tensor-parallel shards with stride 2, each shard in two ranges, in four files."""
    partial = folder / f"step_{step:08d}.partial"
    (partial / "decoder").mkdir(parents=True)
    a, b, c, d = WHOLE.chunk(4)  # stride 2: rank 0 holds parts a and c, rank 1 b and d
    pieces = []
    for tensor_rank, shard in enumerate((torch.cat((a, c)), torch.cat((b, d)))):
        for data_rank, (start, size) in enumerate(((0, 10), (10, 14))):
            file = rank_file(2 * data_rank + tensor_rank)
            flat = shard.flatten()[start : start + size].clone()
            tensors = {piece_name("w", state): flat + number for number, state in enumerate(STATES)}
            save_file(tensors, partial / "decoder" / file)
            pieces.append(Piece(file, tensor_rank, start, size))
    index = ParameterIndex((8, 6), 0, 2, 2, tuple(pieces))
    write_index(partial / "decoder", {"w": replace(index, **changes)})
    state = {
        "step": step,
        "progress": {"trained_tokens": 7.0},
        "topology": {"tensor": 2, "data": 2},
        "zero_stages": {"decoder": 1},
        "optimizer_steps": {"decoder": 1.0},
        "engine_counters": {"decoder": {"global_steps": 1, "skipped_steps": 0}},
    }
    (partial / "state.json").write_text(json.dumps(state))
    files = [path for path in partial.rglob("*") if path.is_file()]
    write_manifest(partial, {str(path.relative_to(partial)): record_file(path) for path in files})
    return publish(partial)


def test_ranges_and_strided_shards_come_together(tmp_path: Path) -> None:
    reader = CheckpointReader(make_checkpoint(tmp_path), verify=True)
    assert reader.components() == ["decoder"]
    assert reader.parameters("decoder") == {"w": (8, 6)}
    for number, state in enumerate(STATES):
        assert torch.equal(reader.read("decoder", "w", state), WHOLE + number)


def test_publishing_points_latest_at_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    folder = make_checkpoint(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "step_00000002\n"
    assert not list(tmp_path.glob("*.partial"))
    for path in (folder, tmp_path):
        assert find_checkpoint(path) == folder


def test_nothing_to_find_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        find_checkpoint(tmp_path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "decoder/rank_00001.safetensors is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "rank_00001.safetensors has"),
        (Path.unlink, "decoder/rank_00001.safetensors is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, message: str) -> None:
    folder = make_checkpoint(tmp_path)
    damage(folder / "decoder" / rank_file(1))
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder, verify=True)


def test_swapped_files_are_found(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    one, two = folder / "decoder" / rank_file(0), folder / "decoder" / rank_file(1)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    with pytest.raises(CheckpointError, match="2|damaged"):
        CheckpointReader(folder, verify=True)


def test_a_manifest_of_another_run_is_found(tmp_path: Path) -> None:
    mine, other = make_checkpoint(tmp_path / "mine"), make_checkpoint(tmp_path / "other", shape=(6, 8))
    (other / "manifest.json").replace(mine / "manifest.json")
    with pytest.raises(CheckpointError, match="decoder/index.json is damaged"):
        CheckpointReader(mine, verify=True)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no manifest.json"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((Piece("../w", 0, 0, 24), Piece("f", 1, 0, 24)), "points outside its folder"),
        ((Piece("/etc/passwd", 0, 0, 24), Piece("f", 1, 0, 24)), "points outside its folder"),
        ((Piece("f", 0, 0, 10), Piece("f", 0, 11, 13), Piece("f", 1, 0, 24)), "overlap or leave a gap at 10"),
        ((Piece("f", 0, 0, 24),), "hold 0 of 24"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, pieces: tuple[Piece, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(make_checkpoint(tmp_path, pieces=pieces))


def test_a_pickle_in_place_of_tensors_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = make_checkpoint(tmp_path)
    (folder / "decoder" / rank_file(0)).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(folder).read("decoder", "w")
    assert not (tmp_path / "executed").exists()


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "decoder" / rank_file(0)).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointReader(folder).read("decoder", "w")


def test_old_checkpoints_go_and_marked_ones_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_00000009.partial").mkdir()
    prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=3)
    assert list_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in (3, 6, 7)]
    assert not list(tmp_path.glob("*.partial"))


def test_the_only_whole_checkpoint_stays(tmp_path: Path) -> None:
    for step in range(1, 5):
        make_checkpoint(tmp_path, step)
    for step in (3, 4):
        flip_a_bit(step_folder(tmp_path, step) / "decoder" / rank_file(0))
    prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=None)
    assert list_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in (2, 3, 4)]


def test_tensors_are_written_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(n * 700_001) for n in range(1, 4)}
    record = write_tensors(tmp_path / "ours", tensors)
    assert record == record_file(tmp_path / "ours")
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_parameter_may_have_its_weight_alone(tmp_path: Path) -> None:
    reader = CheckpointReader(make_checkpoint(tmp_path, states=("master",)))
    assert reader.states("decoder", "w") == ("master",)
    assert torch.equal(reader.read("decoder", "w"), WHOLE)
    with pytest.raises(CheckpointError, match="has no 'exp_avg' of decoder.w"):
        reader.read("decoder", "w", "exp_avg")


@pytest.mark.parametrize("states", [(), ("exp_avg",), ("master", "other")])
def test_states_that_cannot_be_are_refused(tmp_path: Path, states: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError, match="has states"):
        CheckpointReader(make_checkpoint(tmp_path, states=states))


def test_a_checkpoint_is_described_and_compared(tmp_path: Path) -> None:
    readers = [CheckpointReader(make_checkpoint(tmp_path, step)) for step in (1, 2)]
    assert "written by    tensor 2 x data 2" in describe_checkpoint(readers[0])
    assert "decoder       1 parameters, 48 values, ZeRO 1, 1 updates" in describe_checkpoint(readers[0])
    (same,) = compare_checkpoints(*readers, "master")
    assert (same.name, same.largest, same.relative) == ("w", 0.0, 0.0)


def test_a_state_that_neither_has_is_no_agreement(tmp_path: Path) -> None:
    readers = [CheckpointReader(make_checkpoint(tmp_path, step)) for step in (1, 2)]
    with pytest.raises(CheckpointError, match="neither .*step_00000001 nor .* holds a state 'average'"):
        list(compare_checkpoints(*readers, "average"))


def test_a_parameter_of_another_shape_differs_without_end(tmp_path: Path) -> None:
    one = CheckpointReader(make_checkpoint(tmp_path, 1))
    two = CheckpointReader(make_checkpoint(tmp_path, 2, shape=(6, 8), partition_dim=1))
    (found,) = compare_checkpoints(one, two, "master")
    assert found.largest == math.inf
