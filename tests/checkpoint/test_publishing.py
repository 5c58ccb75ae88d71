"""Checkpoints that one process makes of weights alone: complete, or not there at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from metalm.checkpoint.names import list_checkpoints
from metalm.checkpoint.publishing import checkpoint_of_weights, write_json
from metalm.checkpoint.reader import CheckpointReader
from metalm.checkpoint.state import RunFacts, RunState, parse_state
from metalm.errors import CheckpointError

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([7.0])}
FACTS = RunFacts(tokenizer="f" * 64, origin="a folder")


def pieces() -> list[tuple[str, torch.Tensor]]:
    return [(f"{name}|master", tensor.flatten()) for name, tensor in WEIGHTS.items()]


def test_a_checkpoint_of_weights_is_whole_and_its_state_complete(tmp_path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
    with checkpoint_of_weights(tmp_path, ("decoder",), FACTS, b"run: {}") as writer:
        writer.write("decoder", shapes, ("master",), iter(pieces()))
    (folder,) = list_checkpoints(tmp_path)
    reader = CheckpointReader(folder, verify=True)
    assert all(torch.equal(reader.read("decoder", name), tensor) for name, tensor in WEIGHTS.items())
    assert reader.lane_states() == {}
    assert reader.path_of("config.yaml").read_bytes() == b"run: {}"
    assert json.loads((folder / "state.json").read_text()) == {
        "progress": {"trained_tokens": 0.0},
        "tokenizer": "f" * 64,
        "guard": None,
        "origin": "a folder",
        "step": 0,
        "topology": {"tensor": 1, "context": 1, "data": 1},
        "zero_stages": {"decoder": 0},
        "optimizer_steps": {"decoder": 0.0},
        "engine_counters": {"decoder": {"global_steps": 0, "skipped_steps": 0}},
    }


def test_all_of_a_checkpoint_is_on_disk_before_older_ones_may_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: set[int] = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        forced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", note)
    with checkpoint_of_weights(tmp_path, ("decoder",), FACTS, b"run: {}") as writer:
        shapes = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}
        writer.write("decoder", shapes, ("master",), iter(pieces()))
    written = [tmp_path, *tmp_path.rglob("*")]
    assert len(written) > 6
    assert [path for path in written if path.stat().st_ino not in forced] == []
    write_json(tmp_path / "lanes_00000.json", {})
    assert (tmp_path / "lanes_00000.json").stat().st_ino in forced


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        with checkpoint_of_weights(tmp_path, ("decoder",), FACTS, None) as writer:
            writer.write("decoder", {"a": (9,)}, ("master",), iter(pieces()))
    assert list(tmp_path.iterdir()) == []


def test_a_state_comes_back_as_it_was_to_the_last_bit() -> None:
    numbers = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()
    guard = {"window": numbers, "filled": 50, "skipped": [50, 0, 2]}
    content = json.loads(RunState.of_weights(("decoder",), FACTS).to_json()) | {"guard": guard}
    state = parse_state(json.dumps(content).encode(), "state.json")
    assert parse_state(state.to_json().encode(), "state.json") == state
    assert state.guard is not None and [list(row) for row in state.guard.window] == numbers
