from __future__ import annotations

import pytest

from distributed.tiny import tiny_config
from metalm.errors import TopologyError
from metalm.model.parameters import ParameterCount
from metalm.training.plan import describe_plan, plan_component


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "gradients", "optimizer"),
    [
        (1, "fp32", 4000, 4000, 3000),
        (2, "fp32", 4000, 1000, 3000),
        (3, "fp32", 1000, 1000, 3000),
        (1, "bf16", 2000, 2000, 3000),
        (3, "bf16", 500, 500, 3000),
    ],
)
def test_zero_shards_the_optimizer_then_gradients_then_weights(
    stage: int, precision: str, weights: int, gradients: int, optimizer: int
) -> None:
    """1,000 parameters on 4 ranks; fp32 master and two moments are 12 bytes a parameter."""
    plan = plan_component(ParameterCount(2000, 1000), stage, 4, precision)
    assert plan.parameters == 2000
    assert (plan.weight_bytes, plan.gradient_bytes, plan.optimizer_bytes) == (weights, gradients, optimizer)


def test_the_plan_states_the_batch_arithmetic() -> None:
    text = describe_plan(tiny_config("unused", tensor=2, micro_batch_size=1), 4)
    assert "4: tensor 2 x data 2" in text
    assert "8 rows = 2 data-parallel ranks x 4 micro-batch(es) x 1 row(s)" in text
    assert "4, 2 per data-parallel rank" in text


def test_an_impossible_layout_has_no_plan() -> None:
    with pytest.raises(TopologyError):
        describe_plan(tiny_config("unused", tensor=2), 3)
