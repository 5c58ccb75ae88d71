"""Averaged weights on several ranks: the plain model's, and the same bits wherever the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distributed.ranks import run_ranks
from distributed.tiny import global_batch, rate_of, tiny_config
from metalm.checkpoint.reader import CheckpointReader
from reference import training as reference

DECAY = 0.7


def read(folder: Path, step: int, state: str) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / "checkpoints" / f"step_{step:08d}", verify=True)
    return {
        f"{component}/{name}": reader.read(component, name, state)
        for component in reader.components()
        for name in reader.parameters(component)
    }


def test_is_that_of_the_plain_model_and_goes_on_bit_for_bit_on_another_topology(tmp_path: Path) -> None:
    """Two steps tensor-parallel under ZeRO 1 and 3, one more data-parallel under ZeRO 3 and 1."""
    first, second = tmp_path / "first", tmp_path / "second"
    shape = json.dumps({"tensor": 2, "micro_batch_size": 2})
    (before,) = run_ranks("average_tiny", 2, str(first), shape, "1,3", str(DECAY), "2")
    checkpoint = first / "checkpoints" / "step_00000002"
    shape = json.dumps({"micro_batch_size": 2})
    (after,) = run_ranks("average_tiny", 2, str(second), shape, "3,1", str(DECAY), "1", str(checkpoint))
    saved, restored = read(first, 2, "average"), read(second, 2, "average")
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) for name in saved)

    config = tiny_config("unused")
    start = {name: weight.double() for name, weight in read(first, 0, "master").items()}
    expected = dict(start)
    for step in (1, 2, 3):
        batches, rates = zip(*((global_batch(n), rate_of(n)) for n in range(step)), strict=True)
        losses, weights = reference.train(list(batches), start, config, list(rates))
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * weights[n] for n in expected}
    assert before["losses"] + after["losses"] == pytest.approx(losses, abs=1e-5)
    found, trained = read(second, 3, "average"), read(second, 3, "master")
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-5, rtol=0)
    moved = [float((found[name] - trained[name]).abs().max()) for name in found]
    assert sum(distance > 1e-4 for distance in moved) > 0.9 * len(moved)
