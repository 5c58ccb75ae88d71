from __future__ import annotations

from pathlib import Path

import pytest

from distributed.planned import planned_config
from distributed.ranks import run_ranks
from metalm.model.parameters import ParameterCount
from metalm.planning.devices import find_device
from metalm.planning.memory import shard_bytes
from metalm.planning.plan import plan_run
from metalm.planning.zero import ZeroSettings

JSONS = Path("deepspeed_configs")


@pytest.mark.parametrize(
    ("stage", "size", "weights", "gradients", "optimizer"),
    [
        (1, 4, 4000, 3200, 2400),
        (2, 4, 4000, 800, 2400),
        (3, 4, 1000, 800, 2400),
        (1, 2, 2000, 1600, 2400),
        (3, 2, 500, 400, 2400),
    ],
)
def test_zero_shards_the_optimizer_then_gradients_then_weights(
    stage: int, size: int, weights: int, gradients: int, optimizer: int
) -> None:
    """1,000 parameters on 4 ranks, 200 of them frozen; fp32 master and two moments are 12 bytes each."""
    zero = ZeroSettings(stage, False, 1, 1, 1, offloads_optimizer=False)
    found = shard_bytes(ParameterCount(2000, 1000, 200), zero, 4, size)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 1), (2, 2)])
def test_bytes_and_traffic_equal_those_of_real_engines(tensor: int, data: int, tmp_path: Path) -> None:
    """Weights, optimizer and traffic from the engines' own tensors and collectives; what autograd kept.

    The model is so small that ZeRO 3 would keep all of it gathered: one pair of JSONs forbids that.
    """
    strict = tmp_path / "strict.json"
    strict.write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0,'
        ' "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}}'
    )
    pairs = [
        (f"{JSONS}/decoder_zero1.json", f"{JSONS}/encoders_zero1.json"),
        (f"{JSONS}/decoder_zero2.json", f"{JSONS}/encoders_zero2.json"),
        (f"{JSONS}/decoder_zero1.json", f"{JSONS}/encoders_zero3.json"),
        (str(strict), str(strict)),
    ]
    results = run_ranks("measure_plan", tensor * data, str(tensor), *(",".join(pair) for pair in pairs))
    assert len(results) == tensor * data * len(pairs)
    for result in results:
        decoder, encoders = result["pair"].split(",")
        config = planned_config(tensor=tensor, decoder=decoder, encoders=encoders)
        plan = plan_run(config, tensor * data, find_device("cpu"))
        for name, engine in plan.engines.items():
            assert result[name]["weights"] == pytest.approx(engine.held.weights, rel=0.02), name
            assert result[name]["optimizer"] == pytest.approx(engine.held.optimizer, rel=0.02), name
        if result["pair"] == ",".join(pairs[0]):
            assert result["activations"] == pytest.approx(plan.bytes_by_kind["activations"], rel=0.02)
        if "encoders_zero3" not in result["pair"]:
            sent = sum(part.num_bytes for part in plan.traffic)
            assert sum(result["sent"].values()) == pytest.approx(sent, rel=0.02)
