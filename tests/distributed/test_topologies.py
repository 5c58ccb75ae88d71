"""The invariant: same config and seed, same losses and weights, on any topology; and the paper's, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distributed.ranks import run_ranks
from distributed.tiny import RATES, STEPS, global_batch, tiny_config
from metalm.checkpoint.reader import CheckpointReader
from reference import training as reference

TOPOLOGIES = {"tp1_dp1": (1, 1), "tp2_dp1": (2, 1), "tp1_dp2": (1, 2), "tp2_dp2": (2, 2), "tp4_dp1": (4, 1)}
ZERO_PAIRS = ("1,1", "1,3", "2,1", "2,3")


def read_weights(folder: Path, step: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / "checkpoints" / f"step_{step:08d}", verify=True)
    return {
        f"{component}/{name}": reader.read(component, name).to(dtype)
        for component in reader.components()
        for name in reader.parameters(component)
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory):
    """The reference trained from the initial weights of a single rank, in float64."""
    folder = tmp_path_factory.mktemp("start")
    run_ranks("train_tiny", 1, str(folder), '{"micro_batch_size": 2}', "1,1")
    start = read_weights(folder / "zero_1_1", 0)
    losses, weights = reference.train(
        [global_batch(number) for number in range(STEPS)], start, tiny_config(str(folder)), RATES
    )
    return start, losses, weights


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_losses_and_weights_equal_the_plain_model(name: str, expected, tmp_path: Path) -> None:
    tensor, data = TOPOLOGIES[name]
    start, losses, weights = expected
    shape = {"tensor": tensor, "micro_batch_size": 1 if data == 1 else 2}
    results = run_ranks("train_tiny", tensor * data, str(tmp_path), json.dumps(shape), *ZERO_PAIRS)
    assert [result["zero"] for result in results] == list(ZERO_PAIRS)
    for result in results:
        assert result["losses"] == pytest.approx(losses, abs=1e-5), result["zero"]
        assert result["drift"] == []
        folder = tmp_path / f"zero_{result['zero'].replace(',', '_')}"
        for step, wanted in ((0, start), (STEPS, weights)):
            found = read_weights(folder, step)
            assert found.keys() == wanted.keys()
            for parameter, value in wanted.items():
                torch.testing.assert_close(
                    found[parameter], value, atol=1e-5, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}"
                )


def test_the_start_is_clipped_and_moves(expected) -> None:
    """The comparison would be idle if no step were clipped or nothing were learnt."""
    start, _, weights = expected
    moved = [float((weights[name] - start[name]).abs().max()) for name in start]
    assert min(moved) > 1e-6 or sum(value > 1e-4 for value in moved) > 0.9 * len(moved)
