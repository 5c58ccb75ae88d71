from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed.planned import measured_batches, planned_config
from distributed.ranks import run_ranks
from metalm.config import RunConfig
from metalm.model.decoder import Decoder
from metalm.model.encoder import EncoderBank
from metalm.model.parameters import ParameterCount
from metalm.parallel.topology import Topology
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
    zero = ZeroSettings(stage, False, 1, 1, 1, node_shards=1, offloads_optimizer=False)
    found = shard_bytes(ParameterCount(2000, 1000, 200), zero, 4, size)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_a_copy_of_the_weights_in_each_node_is_held_besides_the_shard_and_gathered_inside(
    tmp_path: Path,
) -> None:
    """The backward's gathers stay among 4 ranks of a node; the forward's go over all 16."""
    parted = tmp_path / "encoders.json"
    parted.write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}')
    plans = {}
    for name, path in (("plain", JSONS / "encoders_zero3.json"), ("parted", parted)):
        config = planned_config(encoders=str(path))
        content = config.model_dump()
        content["data"]["lanes"] = content["training"]["global_batch_size"] = 32
        content["model"]["encoders"]["text"] |= {"num_layers": 256, "hidden_size": 512}
        plans[name] = plan_run(RunConfig.model_validate(content), 16, find_device("h100"))
    count, size = plans["plain"].engines["encoders"].count.per_rank, 4
    held = {name: plan.engines["encoders"].held.weights for name, plan in plans.items()}
    assert held["plain"] == size * -(-count // 16)
    assert held["parted"] == size * (-(-count // 16) + -(-count // 4))
    sent = {name: {t.kind: t for t in plan.traffic} for name, plan in plans.items()}
    assert sent["plain"]["encoders weights"].num_bytes == pytest.approx(2 * size * count * 15 / 16)
    assert sent["parted"]["encoders weights"].num_bytes == pytest.approx(size * count * 15 / 16)
    inside = sent["parted"]["encoders weights, backward"]
    assert (inside.group_size, inside.spans_nodes) == (4, False)
    assert inside.num_bytes == pytest.approx(size * count * 3 / 4)


@pytest.mark.parametrize(("tensor", "context", "data"), [(1, 1, 1), (2, 1, 1), (2, 1, 2), (1, 2, 1)])
def test_bytes_and_traffic_equal_those_of_real_engines(
    tensor: int, context: int, data: int, tmp_path: Path
) -> None:
    """Weights, optimizer and traffic from the engines' own tensors and collectives; what autograd kept.

    Of two context ranks each keeps little more than half of what one keeps.

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
    ranks = tensor * context * data
    sizes = (str(tensor), str(context))
    results = run_ranks("measure_plan", ranks, *sizes, *(",".join(pair) for pair in pairs))
    assert len(results) == ranks * len(pairs)
    for result in results:
        decoder, encoders = result["pair"].split(",")
        config = planned_config(tensor=tensor, context=context, decoder=decoder, encoders=encoders)
        plan = plan_run(config, ranks, find_device("cpu"))
        for name, engine in plan.engines.items():
            assert result[name]["weights"] == pytest.approx(engine.held.weights, rel=0.02), name
            assert result[name]["optimizer"] == pytest.approx(engine.held.optimizer, rel=0.02), name
        for name, engine in plan.engines.items():
            taken = [other[name]["snapshot"] for other in results if other["pair"] == result["pair"]]
            assert sum(taken) == pytest.approx(ranks * engine.snapshot_bytes, rel=0.05), name
            assert max(taken) == pytest.approx(engine.snapshot_bytes, rel=0.1), name
        if result["pair"] == ",".join(pairs[0]):
            assert result["activations"] == pytest.approx(plan.bytes_by_kind["activations"], rel=0.02)
            uncut = plan_run(planned_config(tensor=tensor), tensor, find_device("cpu"))
            share = result["activations"] / uncut.bytes_by_kind["activations"]
            assert share == pytest.approx(1 / context, abs=0.05)
        if "encoders_zero3" not in result["pair"]:
            sent = sum(part.num_bytes for part in plan.traffic)
            assert sum(result["sent"].values()) == pytest.approx(sent, rel=0.02)


def forward(config: RunConfig, topology: Topology) -> tuple[Decoder, EncoderBank, torch.Tensor, int]:
    """The model, its losses on a micro-batch, and how many bytes autograd has kept for the way back."""
    decoder = Decoder(config.model, config.data.sequence_length, topology)
    encoders = EncoderBank(config.model)
    batch = measured_batches(config, 0, 1)[0]
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = decoder(batch, encoders({name: s.shares[0] for name, s in batch.encoders.items()}))
    weights = {p.untyped_storage().data_ptr() for module in (decoder, encoders) for p in module.parameters()}
    return decoder, encoders, losses, sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"connector": "feed_forward"},
        {"connector": "feed_forward", "trained_layers": "none"},
        {"connector": "linear", "trained_layers": "none"},
        {"trained_layers": "none", "trained_connector": False},
    ],
)
def test_connectors_keep_what_they_read_and_their_inner_layers(
    changes: dict[str, object], topology: Topology
) -> None:
    content = planned_config().model_dump()
    for encoder in content["model"]["encoders"].values():
        encoder |= changes
    config = RunConfig.model_validate(content)
    plan = plan_run(config, 1, find_device("cpu"))
    *_, measured = forward(config, topology)
    assert plan.bytes_by_kind["activations"] == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("trained_layers", "share"), [("all", 1.0), (2, 0.85), ("none", 0.69)])
def test_frozen_layers_keep_less_for_the_backward_pass_and_hold_no_gradients(
    trained_layers: int | str, share: float, topology: Topology
) -> None:
    """What autograd keeps is measured; the share is of what it keeps of a decoder that is trained whole."""
    content = planned_config().model_dump()
    content["model"]["decoder"]["trained_layers"] = trained_layers
    config = RunConfig.model_validate(content)
    decoder, _, losses, measured = forward(config, topology)
    plan = plan_run(config, 1, find_device("cpu"))
    assert plan.bytes_by_kind["activations"] == pytest.approx(measured, rel=0.02)
    whole = plan_run(planned_config(), 1, find_device("cpu"))
    assert measured / whole.bytes_by_kind["activations"] == pytest.approx(share, abs=0.01)
    losses.sum().backward()
    gradients = sum(p.grad.nbytes for p in decoder.parameters() if p.grad is not None)
    assert gradients == plan.engines["decoder"].held.gradients


def test_an_average_takes_four_bytes_of_each_parameter(topology: Topology) -> None:
    content = planned_config().model_dump()
    content["training"]["average"] = {"decay": 0.99}
    config = RunConfig.model_validate(content)
    modules = {
        "decoder": Decoder(config.model, config.data.sequence_length, topology),
        "encoders": EncoderBank(config.model),
    }
    with_average, without = (
        plan_run(one, 1, find_device("cpu")).engines for one in (config, planned_config())
    )
    for name, module in modules.items():
        size = sum(parameter.numel() for parameter in module.parameters())
        assert with_average[name].held.optimizer - without[name].held.optimizer == 4 * size
