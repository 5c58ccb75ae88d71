"""The invariant: same config and seed, same losses and weights, on any topology; and the paper's, too."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.ranks import run_ranks
from distributed.tiny import STEPS, global_batch, rate_of, tiny_config
from metalm.checkpoint.reader import CheckpointReader
from reference import training as reference

TOPOLOGIES = {"tp1_dp1": (1, 1), "tp2_dp1": (2, 1), "tp1_dp2": (1, 2), "tp2_dp2": (2, 2), "tp4_dp1": (4, 1)}
ZERO_PAIRS = ("1,1", "1,3", "2,1", "2,3")
FURTHER_STEPS = 10


def read_weights(folder: Path, step: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / "checkpoints" / f"step_{step:08d}", verify=True)
    return {
        f"{component}/{name}": reader.read(component, name).to(dtype)
        for component in reader.components()
        for name in reader.parameters(component)
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory):
    """The reference trained from the initial weights of a single rank, in float64: start, losses of
    the steps and of the further ones, weights after the steps."""
    folder = tmp_path_factory.mktemp("start")
    run_ranks("train_tiny", 1, str(folder), '{"micro_batch_size": 2, "steps": 1}', "1,1")
    start = read_weights(folder / "zero_1_1", 0)
    config = tiny_config(str(folder))
    batches = [global_batch(number) for number in range(STEPS + FURTHER_STEPS)]
    rates = [rate_of(number) for number in range(STEPS + FURTHER_STEPS)]
    _, weights = reference.train(batches[:STEPS], start, config, rates[:STEPS])
    losses, _ = reference.train(batches, start, config, rates)
    return start, losses, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Any]]]:
    """Train on a topology under every ZeRO pair: the folder, with checkpoints of the last step; results."""

    @functools.cache
    def train(name: str) -> tuple[Path, list[Any]]:
        tensor, data = TOPOLOGIES[name]
        folder = tmp_path_factory.mktemp(name)
        shape = json.dumps(shape_of(name))
        return folder, run_ranks("train_tiny", tensor * data, str(folder), shape, *ZERO_PAIRS)

    return train


def shape_of(name: str) -> dict[str, int]:
    tensor, data = TOPOLOGIES[name]
    return {"tensor": tensor, "micro_batch_size": 1 if data == 1 else 2}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_losses_and_weights_equal_the_plain_model(name: str, expected, trained) -> None:
    start, losses, weights = expected
    folder, results = trained(name)
    assert [result["zero"] for result in results] == list(ZERO_PAIRS)
    for result in results:
        assert result["losses"] == pytest.approx(losses[:STEPS], abs=1e-5), result["zero"]
        assert result["drift"] == []
        run = folder / f"zero_{result['zero'].replace(',', '_')}"
        for step, wanted in ((0, start), (STEPS, weights)):
            found = read_weights(run, step)
            assert found.keys() == wanted.keys()
            for parameter, value in wanted.items():
                torch.testing.assert_close(
                    found[parameter], value, atol=1e-5, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}"
                )


@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_with_text_alone_images_alone_or_nothing(tensor: int, expected, tmp_path: Path) -> None:
    """No rank hangs under ZeRO 3, and what the gradients make of the weights is the plain model's."""
    start, _, _ = expected
    batches = [global_batch(number, "lonely") for number in range(2)]
    losses, weights = reference.train(batches, start, tiny_config("unused"), [rate_of(0), rate_of(1)])
    shape = {"tensor": tensor, "micro_batch_size": 2, "rows": "lonely", "steps": 2}
    (result,) = run_ranks("train_tiny", 4, str(tmp_path), json.dumps(shape), "1,3")
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    found = read_weights(tmp_path / "zero_1_3", 2)
    for parameter, value in weights.items():
        torch.testing.assert_close(found[parameter], value, atol=1e-5, rtol=0)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_checkpoints_of_every_topology_go_on_here(name: str, expected, trained, tmp_path: Path) -> None:
    """Ten steps from two ZeRO pairs of each topology; over all targets every pair follows every other."""
    target = list(TOPOLOGIES).index(name)
    resumes = []
    for number, (source, second) in enumerate(itertools.product(TOPOLOGIES, (0, 2))):
        pair = ZERO_PAIRS[(target + number // 2 + second) % len(ZERO_PAIRS)]
        folder, _ = trained(source)
        checkpoint = folder / f"zero_{pair.replace(',', '_')}" / "checkpoints" / f"step_{STEPS:08d}"
        resumes.append(f"{checkpoint}:{ZERO_PAIRS[number % len(ZERO_PAIRS)]}")
    tensor, data = TOPOLOGIES[name]
    shape = json.dumps({"tensor": tensor, "micro_batch_size": 8 // data})
    results = run_ranks(
        "resume_tiny", tensor * data, str(tmp_path), shape, str(FURTHER_STEPS), *resumes, timeout_s=800
    )
    assert [result["resume"] for result in results] == resumes
    _, losses, _ = expected
    for result in results:
        assert result["losses"] == pytest.approx(losses[STEPS:], abs=1e-5), result["resume"]


def test_the_start_is_clipped_and_moves(expected) -> None:
    """The comparison would be idle if no step were clipped or nothing were learnt."""
    start, _, weights = expected
    moved = [float((weights[name] - start[name]).abs().max()) for name in start]
    assert min(moved) > 1e-6 or sum(value > 1e-4 for value in moved) > 0.9 * len(moved)
