"""The encoders' kinds on several ranks against the plain model; what is frozen stays, through checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distributed.encoder_variants import VARIANTS, variant_batch, variant_config
from distributed.ranks import run_ranks
from distributed.test_topologies import read_weights
from distributed.tiny import RATES, STEPS
from metalm.checkpoint.reader import CheckpointReader
from reference import training as reference
from reference.model import Weights

FROZEN_LAYERS = {
    "paper": {"text": 1, "image": 0},
    "connectors": {"text": 3, "image": 2},
    "mixed": {"text": 2, "image": 0},
}
"""Leading layers of each encoder; where there are any, its embeddings are frozen, too."""


def frozen_names(variant: str, weights: Weights) -> set[str]:
    found = set()
    for name, count in FROZEN_LAYERS.get(variant, {}).items():
        prefix = f"encoders/encoders.{name}."
        trained = [
            f"{prefix}layers.{number}." for number in range(count, VARIANTS[variant][name]["num_layers"])
        ]
        trained += [f"{prefix}connector."] + ([f"{prefix}final_norm."] if trained else [])
        own = {n for n in weights if n.startswith(prefix) and not n.startswith(tuple(trained))}
        found |= own if count else set()
    return found


@dataclass(frozen=True)
class Plain:
    """The plain model trained from the initial weights of a single rank."""

    variant: str
    folder: Path
    start: Weights
    losses: list[float]
    weights: Weights
    frozen: set[str]


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    variant = request.param
    folder = tmp_path_factory.mktemp(variant)
    run_ranks("train_encoders", 1, variant, "1", "2", str(folder), "new", "1,1")
    start = read_weights(folder / "zero_1_1", 0)
    frozen = frozen_names(variant, start)
    losses, weights = reference.train(
        [variant_batch(step) for step in range(STEPS)], start, variant_config(variant, ""), RATES, frozen
    )
    return Plain(variant, folder, start, losses, weights, frozen)


@pytest.mark.parametrize(
    ("plain", "tensor", "data"),
    [("paper", 2, 1), ("paper", 1, 2), ("today", 2, 1), ("mixed", 1, 2)],
    indirect=["plain"],
)
def test_losses_and_weights_equal_the_plain_model(
    plain: Plain, tensor: int, data: int, tmp_path: Path
) -> None:
    pairs = ("2,2", "1,3")
    results = run_ranks(
        "train_encoders", tensor * data, plain.variant, str(tensor), str(data), str(tmp_path), "new", *pairs
    )
    assert [result["zero"] for result in results] == list(pairs)
    for result in results:
        assert result["losses"] == pytest.approx(plain.losses, abs=1e-5), result["zero"]
        folder = tmp_path / f"zero_{result['zero'].replace(',', '_')}"
        for step, wanted in ((0, plain.start), (STEPS, plain.weights)):
            found = read_weights(folder, step)
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                torch.testing.assert_close(
                    found[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
                )
            for name in plain.frozen:
                assert torch.equal(found[name], plain.start[name]), name


@pytest.mark.parametrize("plain", ["paper", "mixed"], indirect=True)
def test_exactly_the_named_layers_move(plain: Plain) -> None:
    moved = {name for name, start in plain.start.items() if not torch.equal(start, plain.weights[name])}
    still = plain.start.keys() - moved
    assert plain.frozen <= still
    assert any("text.layers.0." in name for name in plain.frozen)
    assert not any("connector" in name or name.startswith("decoder/") for name in still)


@pytest.mark.parametrize("plain", ["paper"], indirect=True)
def test_resuming_on_another_topology_and_stage_repeats_the_losses(plain: Plain, tmp_path: Path) -> None:
    checkpoint = plain.folder / "zero_1_1" / "checkpoints" / "step_00000002"
    results = run_ranks(
        "train_encoders", 2, plain.variant, "2", "4", str(tmp_path), str(checkpoint), "1,3", "2,1"
    )
    for result in results:
        assert result["losses"] == pytest.approx(plain.losses[2:], abs=1e-5), result["zero"]


def test_a_run_goes_on_with_other_layers_trained(tmp_path: Path) -> None:
    """Frozen to trained begins without moments; trained to frozen keeps the weight."""
    run_ranks("train_encoders", 1, "connectors", "1", "8", str(tmp_path / "few"), "new", "1,1")
    few = tmp_path / "few" / "zero_1_1" / "checkpoints" / "step_00000002"
    frozen = frozen_names("connectors", read_weights(tmp_path / "few" / "zero_1_1", 0))
    run_ranks("train_encoders", 2, "all_trained", "1", "4", str(tmp_path / "all"), str(few), "1,3")
    run_ranks(
        "train_encoders",
        1,
        *("connectors", "1", "8", str(tmp_path / "back")),
        *(str(tmp_path / "all" / "zero_1_3" / "checkpoints" / f"step_{STEPS:08d}"), "1,1"),
    )
    reader = CheckpointReader(few)
    name = min(frozen).removeprefix("encoders/")
    assert reader.states("encoders", name) == ("master",)
    loaded, trained = (read_weights(tmp_path / "all" / "zero_1_3", step) for step in (2, STEPS))
    assert all(
        torch.equal(loaded[name], read_weights(tmp_path / "few" / "zero_1_1", 2)[name]) for name in loaded
    )
    assert all(not torch.equal(loaded[name], trained[name]) for name in frozen)
    back = read_weights(tmp_path / "back" / "zero_1_1", STEPS)
    assert all(torch.equal(back[name], trained[name]) for name in back)


def test_dropout_is_the_same_on_any_topology_micro_batch_and_recomputation_and_after_a_resume(
    tmp_path: Path,
) -> None:
    def losses(name: str, ranks: int, *arguments: str) -> list[float]:
        variant, tensor, micro_batch_size, start, pair = arguments
        (result,) = run_ranks(
            "train_encoders", ranks, variant, tensor, micro_batch_size, str(tmp_path / name), start, pair
        )
        return result["losses"]

    expected = losses("alone", 1, "dropout", "1", "8", "new", "1,1")
    without = losses("without", 1, "paper", "1", "8", "new", "1,1")
    assert max(abs(one - other) for one, other in zip(expected, without, strict=True)) > 1e-3
    found = losses("tensor", 2, "dropout_recomputed", "2", "1", "new", "2,3")
    assert found == pytest.approx(expected, abs=1e-5)
    middle = tmp_path / "tensor" / "zero_2_3" / "checkpoints" / "step_00000002"
    found = losses("data", 2, "dropout", "1", "4", str(middle), "1,2")
    assert found == pytest.approx(expected[2:], abs=1e-5)
