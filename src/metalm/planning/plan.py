"""The plan of one run on one layout: memory, communication, operations, time.

Time is a sum of stated parts, not a simulation: matrix products at a stated share of the peak, links at a
stated share of their rate, the optimizer at the memory's rate; only what the engines overlap is hidden.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from metalm.config import RunConfig
from metalm.config.rules import check_topology
from metalm.model.flops import (
    Work,
    decoder_backward_flops,
    decoder_flops,
    encoder_backward_flops,
    encoder_flops,
    frozen_flops,
    training_flops,
)
from metalm.planning.communication import Traffic, plan_traffic
from metalm.planning.devices import Device
from metalm.planning.memory import KINDS, EnginePlan, element_size, plan_engines, share_elements
from metalm.planning.workload import CAPTION_TOKENS, mean_row, scaled

CONTEXT_BYTES = 3 * 2**30
"""Held by the device's context, the communication library and the kernels."""
USABLE_SHARE = 0.92
"""Of the memory: the rest is lost between the allocator's blocks."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know. All can be set."""

    compute_efficiency: float = 0.6
    """Share of the peak that the layers' products and attention reach."""
    link_efficiency: float = 0.75
    """Share of a link's rate that large collectives reach."""
    caption_tokens: int = CAPTION_TOKENS
    """Mean length of a caption."""


@dataclass(frozen=True)
class Plan:
    """One run on one layout and device."""

    config: RunConfig
    world_size: int
    device: Device
    assumptions: Assumptions
    accumulation: int
    """Micro-batches per step of one rank."""
    row: Work
    """The mean work of a row."""
    engines: dict[str, EnginePlan]
    traffic: list[Traffic]
    model_flops: float
    """Of a step, over all ranks: what the rows' content needs."""
    executed_flops: float
    """Of a step and one rank, with padding and recomputation."""
    parts_s: dict[str, float]
    """What the step's time is made of, in seconds."""

    @property
    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes of one rank, over both engines."""
        return {kind: sum(getattr(e.held, kind) for e in self.engines.values()) for kind in KINDS}

    @property
    def total_bytes(self) -> float:
        """Bytes of one rank."""
        return sum(self.bytes_by_kind.values())

    @property
    def limit_bytes(self) -> float:
        """Bytes that a rank may hold."""
        return self.device.memory_bytes * USABLE_SHARE - CONTEXT_BYTES

    @property
    def fits(self) -> bool:
        """Whether one device holds a rank."""
        return self.total_bytes <= self.limit_bytes

    @property
    def peak_tflops(self) -> float:
        """Of one device, in the precision of the run."""
        return _peak_tflops(self.config, self.device)

    @property
    def step_s(self) -> float:
        """Expected seconds of a step."""
        return sum(self.parts_s.values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the devices could do in the time of a step."""
        return self.model_flops / (self.step_s * self.world_size * self.peak_tflops * 1e12)

    @property
    def days(self) -> float:
        """From the first step to the last."""
        return self.step_s * self.config.training.steps / 86400


def plan_run(
    config: RunConfig, world_size: int, device: Device, assumptions: Assumptions | None = None
) -> Plan:
    """Work out a run on so many ranks, one device each.

    Raises:
        TopologyError: so many ranks cannot hold the run.
    """
    check_topology(config, world_size)
    assumptions = assumptions or Assumptions()
    training, sharing = config.training, config.parallel.rows_size
    accumulation = training.global_batch_size // (world_size // sharing * training.micro_batch_size)
    row = mean_row(config, assumptions.caption_tokens)
    micro_batch = scaled(row, training.micro_batch_size)
    engines = plan_engines(config, world_size, micro_batch)
    traffic = plan_traffic(config, world_size, engines, micro_batch, device.per_node)
    step_work = scaled(row, training.global_batch_size)
    executed = accumulation * _executed_flops(config, micro_batch)
    return Plan(
        config=config,
        world_size=world_size,
        device=device,
        assumptions=assumptions,
        accumulation=accumulation,
        row=row,
        engines=engines,
        traffic=traffic,
        model_flops=training_flops(step_work, config.model),
        executed_flops=executed,
        parts_s=_times(config, device, assumptions, executed, engines, traffic),
    )


def _peak_tflops(config: RunConfig, device: Device) -> float:
    return device.peak_tflops if config.training.precision == "bf16" else device.fp32_tflops


def _executed_flops(config: RunConfig, micro_batch: Work) -> float:
    """Of one rank and one micro-batch: all positions of the rows, and padded shares."""
    model, sharing = config.model, config.parallel.rows_size
    positions = config.training.micro_batch_size * config.data.sequence_length
    whole = dataclasses.replace(micro_batch, positions=positions)
    passes = 2 if model.decoder.recompute else 1
    total = (passes * decoder_flops(whole, model) + decoder_backward_flops(whole, model)) / sharing
    for name, encoder in model.encoders.items():
        work = micro_batch.encoders[name]
        if work.elements:
            padding = share_elements(micro_batch, name, sharing) * sharing / work.elements
            flops = encoder_flops(work, name, model) + encoder_backward_flops(work, name, model)
            if encoder.recompute:
                flops += encoder_flops(work, name, model) - frozen_flops(work, name, model)
            total += padding * flops / sharing
    return total


def _times(
    config: RunConfig,
    device: Device,
    assumptions: Assumptions,
    executed_flops: float,
    engines: dict[str, EnginePlan],
    traffic: list[Traffic],
) -> dict[str, float]:
    peak = _peak_tflops(config, device) * 1e12
    compute_s = executed_flops / (peak * assumptions.compute_efficiency)
    # The update reads and writes masters and moments, reads gradients, writes weights.
    update_bytes = sum(
        (2 * 12 + 4 + element_size(config)) * e.count.trained_per_rank / e.shards for e in engines.values()
    )
    hidden_s, parts = 0.0, {"compute": compute_s, "optimizer": update_bytes / device.memory_bandwidth}
    for part in traffic:
        rate = device.inter_node if part.spans_nodes else device.intra_node
        seconds = part.num_bytes / (rate * assumptions.link_efficiency)
        if part.hidden:
            hidden_s += seconds
        else:
            parts[part.kind] = seconds
    if hidden_s > compute_s:
        parts["ZeRO beyond the computation"] = hidden_s - compute_s
    return parts
