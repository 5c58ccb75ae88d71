"""Tensor ranks whose data-parallel groups sum in other orders stay one; what differs is found."""

from __future__ import annotations

from typing import Any

import pytest

from distributed.ranks import run_ranks

PAIRS = ("1,unified", "1,apart", "3,unified", "3,apart")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """By `STAGE,unified` and `STAGE,apart`."""
    return {result["pair"]: result for result in run_ranks("drift_apart", 4, *PAIRS)}


def test_another_order_of_summation_is_no_drift(found: dict[str, Any]) -> None:
    for stage in (1, 3):
        assert found[f"{stage},unified"]["drift"] == [[], []], stage


def test_without_one_gradient_it_is_from_the_first_step_on(found: dict[str, Any]) -> None:
    """Of what every tensor rank holds, and not of shards; nobody would see it in the losses."""
    bias = "decoder.gpt.decoder.layers.0.mlp_norm.bias on rank "
    for pair in ("1,apart", "3,apart"):
        first, second = found[pair]["drift"]
        assert any(line.startswith(bias) for line in first) and second
        assert not any("word_embeddings" in line for line in first + second)
        assert found[pair]["losses"] == pytest.approx(found["1,unified"]["losses"], abs=1e-5)


def test_padding_behind_partitions_is_none() -> None:
    results = run_ranks("drift_padded", 6)
    assert sum(result["padded"] for result in results) > 0
    assert [result["drift"] for result in results] == [[]] * len(results)
