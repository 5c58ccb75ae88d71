"""The plan of one run on one layout: memory, communication, operations, time.

Time is a sum of stated parts, not a simulation: see `timing` for the model, `calibration` for its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from metalm.config import RunConfig
from metalm.config.rules import check_topology
from metalm.model.flops import Work, training_flops
from metalm.planning.calibration import Calibration
from metalm.planning.communication import Traffic, plan_traffic
from metalm.planning.devices import Device
from metalm.planning.memory import KINDS, EnginePlan, plan_engines
from metalm.planning.shipped_calibration import shipped_calibration
from metalm.planning.timing import Cause, Setting, build_setting, step_parts, step_range
from metalm.planning.workload import USUAL, Assumed, mean_row, scaled, source_rows

CONTEXT_BYTES = 3 * 2**30
"""Held by the device's context, the communication library and the kernels."""
USABLE_SHARE = 0.88
"""Of the memory: the rest is lost between the allocator's blocks and in pools of CUDA graphs.

Plans were 0.89 to 0.98 of what was reserved on an H200 (`tools/measured/h200_2026-11-27.json`).
"""


@dataclass(frozen=True)
class Plan:
    """One run on one layout and device."""

    config: RunConfig
    world_size: int
    device: Device
    calibration: Calibration
    assumed: Assumed
    """Of the data."""
    rows: list[tuple[float, Work]]
    """Of each source: its share of the rows, and the work of one."""
    row: Work
    """The mean work of a row."""
    engines: dict[str, EnginePlan]
    traffic: list[Traffic]
    model_flops: float
    """Of a step, over all ranks: what the rows' content needs."""

    @cached_property
    def setting(self) -> Setting:
        """What times follow from."""
        return build_setting(
            self.config, self.world_size, self.device, self.rows, self.row, self.engines, self.traffic
        )

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
        bf16 = self.config.training.precision == "bf16"
        return self.device.peak_tflops if bf16 else self.device.fp32_tflops

    @property
    def accumulation(self) -> int:
        """Micro-batches per step of one rank."""
        return self.setting.accumulation

    @property
    def executed_flops(self) -> float:
        """Of a step and one rank, with padding and what is computed again."""
        return self.accumulation * sum(part.flops for _, part in self.setting.work.parts())

    @cached_property
    def parts_s(self) -> dict[str, float]:
        """What the step's time is made of, in seconds."""
        return step_parts(self.setting, self.calibration)

    @cached_property
    def range_s(self) -> tuple[float, float, list[Cause]]:
        """The least and the greatest seconds of a step, and what they hang on."""
        return step_range(self.setting, self.calibration)

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
    config: RunConfig,
    world_size: int,
    device: Device,
    calibration: Calibration | None = None,
    *,
    assumed: Assumed = USUAL,
) -> Plan:
    """Work out a run on so many ranks, one device each.

    Args:
        config: of the run.
        world_size: ranks.
        device: what each rank has.
        calibration: of the device; by default as shipped.
        assumed: of the data.

    Raises:
        TopologyError: so many ranks cannot hold the run.
    """
    check_topology(config, world_size)
    training = config.training
    rows = source_rows(config, assumed)
    row = mean_row(config, rows)
    micro_batch = scaled(row, training.micro_batch_size)
    engines = plan_engines(config, world_size, micro_batch)
    traffic = plan_traffic(config, world_size, engines, micro_batch, device.per_node)
    return Plan(
        config=config,
        world_size=world_size,
        device=device,
        calibration=calibration or shipped_calibration(device),
        assumed=assumed,
        rows=rows,
        row=row,
        engines=engines,
        traffic=traffic,
        model_flops=training_flops(scaled(row, training.global_batch_size), config.model),
    )
