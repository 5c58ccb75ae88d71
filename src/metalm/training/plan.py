"""What a run will need, worked out before anything is started: `metalm train PIPELINE --dry-run`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import yaml

from metalm.config import RunConfig
from metalm.config.load import load_deepspeed_json
from metalm.config.rules import check_topology
from metalm.model.encoder_parameters import count_connector, count_encoder
from metalm.model.parameters import ParameterCount, count_decoder, count_encoders

MIB = 2**20


@dataclass(frozen=True)
class ComponentPlan:
    """Parameters of an engine and what one rank holds of them."""

    parameters: int
    stage: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def plan_component(count: ParameterCount, stage: int, shards: int, precision: str) -> ComponentPlan:
    """Bytes per rank of one engine under ZeRO.

    Args:
        count: of the component; what one tensor-parallel rank holds.
        stage: ZeRO stage: 1 shards the optimizer, 2 gradients as well, 3 weights as well.
        shards: ranks that ZeRO shards over.
        precision: bf16 keeps fp32 masters in the optimizer beside bf16 weights and gradients; DeepSpeed
            keeps masters in fp32 training, too.
    """
    size = 2 if precision == "bf16" else 4
    held = count.per_rank
    shard = math.ceil(held / shards)
    trained = count.trained_per_rank
    trained_shard = math.ceil(trained / shards)
    return ComponentPlan(
        parameters=count.total,
        stage=stage,
        weight_bytes=size * (shard if stage == 3 else held),
        gradient_bytes=size * (trained_shard if stage >= 2 else trained),
        optimizer_bytes=12 * trained_shard,
    )


def describe_plan(config: RunConfig, world_size: int) -> str:
    """Batch arithmetic, parameters per component, and bytes per rank.

    Raises:
        TopologyError: so many ranks cannot hold the run.
    """
    check_topology(config, world_size)
    tensor, training = config.parallel.tensor, config.training
    data = world_size // tensor
    accumulation = training.global_batch_size // (data * training.micro_batch_size)
    tokens = training.global_batch_size * config.data.sequence_length
    lines = [
        f"ranks           {world_size}: tensor {tensor} x data {data}",
        f"global batch    {training.global_batch_size} rows = {data} data-parallel ranks x {accumulation} "
        f"micro-batch(es) x {training.micro_batch_size} row(s)",
        f"positions       {tokens:,} per step, {tokens * training.steps:,} in {training.steps:,} steps",
        f"lanes           {config.data.lanes}, {config.data.lanes // data} per data-parallel rank",
        "",
        f"{'component':<12}{'parameters':>16}{'ZeRO':>6}{'weights':>12}{'gradients':>12}"
        f"{'optimizer':>12}   MiB per rank",
    ]
    for name, plan in plan_components(config, world_size).items():
        sizes = "".join(
            f"{size / MIB:>12,.1f}" for size in (plan.weight_bytes, plan.gradient_bytes, plan.optimizer_bytes)
        )
        lines.append(f"{name:<12}{plan.parameters:>16,}{plan.stage:>6}{sizes}")
    for name, encoder in config.model.encoders.items():
        lines.append(
            f"  {name:<10}{count_encoder(encoder, config.model):>16,}, and its connector "
            f"{count_connector(encoder, config.model):,}; trained layers: {encoder.trained_layers}"
        )
    return "\n".join(lines)


def plan_components(config: RunConfig, world_size: int) -> dict[str, ComponentPlan]:
    """The plan of each engine, by component."""
    tensor, precision = config.parallel.tensor, config.training.precision
    stages = {
        name: load_deepspeed_json(path)["zero_optimization"]["stage"]
        for name, path in (("decoder", config.deepspeed.decoder), ("encoders", config.deepspeed.encoders))
    }
    decoder = count_decoder(config.model, tensor)
    plans = {"decoder": plan_component(decoder, stages["decoder"], world_size // tensor, precision)}
    if config.model.encoders:
        encoders = count_encoders(config.model)
        plans["encoders"] = plan_component(encoders, stages["encoders"], world_size, precision)
    return plans


def print_plan(config: RunConfig, world_size: int) -> int:
    """Print the resolved config and the plan of a run on so many ranks."""
    plan = describe_plan(config, world_size)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    print(plan)
    return 0
