"""Context parallelism: rows cut over ranks, through their spans, train as they do on one rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.ranks import run_ranks
from distributed.test_options import start_weights
from distributed.test_topologies import read_weights
from distributed.tiny import LENGTH, global_batch, rate_of, tiny_config
from metalm.parallel.topology import Topology
from reference import training as reference

STEPS, DROPOUT_STEPS = 3, 2
FIRST = {
    "sp2": {"zero": "1,3", "steps": STEPS, "context": 2},
    "dropout, sp2": {"zero": "1,1", "steps": DROPOUT_STEPS, "context": 2, "dropout": 0.2},
    "dropout, dp2": {"zero": "1,1", "steps": DROPOUT_STEPS, "dropout": 0.2},
}
"""On two ranks."""
SECOND = {
    # Two key heads are two tensor ranks': both context ranks of each have a copy of its one.
    "tp2 x sp2": {
        "zero": "2,3",
        "steps": STEPS,
        "tensor": 2,
        "context": 2,
        "options": "llama",
        "sequence_parallel": True,
    },
    "sp4": {"zero": "1,3", "steps": STEPS, "context": 4, "options": "mixed", "micro_batch_size": 2},
    "dp2 x sp2": {"zero": "3,1", "steps": 2, "context": 2, "micro_batch_size": 2, "resume": "sp2"},
}
"""On four, in the same folder."""
LAST = {"sp1": {"zero": "1,1", "steps": 2, "micro_batch_size": 4, "resume": "dp2 x sp2"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What every layout came to, by name, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("context")
    found = {}
    for num_ranks, layouts in ((2, FIRST), (4, SECOND), (1, LAST)):
        words = [json.dumps({"name": name, **layout}) for name, layout in layouts.items()]
        results = run_ranks("train_layouts", num_ranks, str(folder), *words)
        found |= {result["name"]: result for result in results}
    return folder, found


@pytest.fixture(scope="module")
def plain(topology: Topology) -> Callable[[str, int], tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses of some steps of the plain model in float64, and the weights after them."""

    def train(options: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        batches, rates = zip(*((global_batch(n), rate_of(n)) for n in range(steps)), strict=True)
        config = tiny_config("unused", options=options)
        return reference.train(list(batches), start_weights(topology, options), config, list(rates))

    return train


def test_spans_are_cut() -> None:
    """The comparison would be idle if no span stood on both sides of a cut."""
    cut = LENGTH // 2
    starts = []
    for row in global_batch(0):
        offset = 0
        for document in row.documents:
            starts += [(offset + span.start, offset + span.end) for span in document.spans]
            offset += len(document.tokens)
    assert any(start < cut < end for start, end in starts)


@pytest.mark.parametrize(
    ("name", "options"), [("sp2", "paper"), ("tp2 x sp2", "llama"), ("sp4", "mixed")], ids=lambda value: value
)
def test_losses_and_weights_equal_the_plain_model(name: str, options: str, plain, trained) -> None:
    folder, found = trained
    losses, weights = plain(options, STEPS)
    assert found[name]["losses"] == pytest.approx(losses, abs=1e-5)
    assert found[name]["drift"] == []
    saved = read_weights(folder / name, STEPS)
    assert saved.keys() == weights.keys()
    for parameter, value in weights.items():
        torch.testing.assert_close(
            saved[parameter], value, atol=1e-5, rtol=0, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_checkpoints_go_on_with_other_numbers_of_context_ranks(plain, trained) -> None:
    """From two context ranks to two for each of two data ranks, and to one rank alone."""
    _, found = trained
    losses, _ = plain("paper", STEPS + 4)
    assert found["dp2 x sp2"]["losses"] == pytest.approx(losses[STEPS:-2], abs=1e-5)
    assert found["sp1"]["losses"] == pytest.approx(losses[-2:], abs=1e-5)


def test_dropout_drops_the_same_of_cut_rows(trained) -> None:
    _, found = trained
    assert found["dropout, sp2"]["losses"] == pytest.approx(found["dropout, dp2"]["losses"], abs=1e-5)
    assert abs(found["dropout, sp2"]["losses"][0] - found["sp2"]["losses"][0]) > 1e-3
