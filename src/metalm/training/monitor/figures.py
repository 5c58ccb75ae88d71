"""What is measured of a run while it trains.

Every rank measures its own share; each figure says how the ranks' values become one. Nothing else in the
monitor computes: sinks show what they are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from metalm.batch import SemiCausalBatch
from metalm.config import RunConfig
from metalm.config.model_schema import ModelConfig
from metalm.data.balance import imbalance_over_ranks
from metalm.data.loader import TrainingData
from metalm.model.flops import count_training_flops
from metalm.parallel.topology import Topology
from metalm.planning.devices import device_by_driver_name
from metalm.training.step import StepResult
from metalm.training.timing import PartTimer


@dataclass(frozen=True)
class Figure:
    """One rank's value, and the function that makes one number of those of all ranks that have the figure."""

    value: Any
    over_ranks: Callable[[Sequence[Any]], float]


def reduce_over_ranks(by_rank: Sequence[Mapping[str, Figure]]) -> dict[str, float]:
    """One number per figure. A figure need not be there on all ranks."""
    found: dict[str, list[Figure]] = {}
    for figures in by_rank:
        for name, figure in figures.items():
            found.setdefault(name, []).append(figure)
    return {name: same[0].over_ranks([figure.value for figure in same]) for name, same in found.items()}


@dataclass(frozen=True)
class BatchCounts:
    """What a step's micro-batches hold."""

    rows: int
    positions: int
    """Without padding."""
    flops: float
    """Of training on them, forward and backward."""


def count_batches(micro_batches: Sequence[SemiCausalBatch], config: ModelConfig) -> BatchCounts:
    """Count micro-batches in host memory."""
    return BatchCounts(
        rows=sum(batch.tokens.shape[0] for batch in micro_batches),
        positions=sum(int((batch.attention_end > batch.attention_start).sum()) for batch in micro_batches),
        flops=sum(count_training_flops(batch, config) for batch in micro_batches),
    )


def data_figures(data: TrainingData) -> dict[str, Figure]:
    """What a rank's data tell of themselves after the step returned last."""
    figures = {f"data/{name}": Figure(count, sum) for name, count in data.counters().items()}
    for source, epoch in data.epochs().items():
        figures[f"data/{source}/epoch"] = Figure(epoch, min)
    figures["data/skipped_samples"] = Figure(data.skipped_samples(), sum)
    for number, (encoder, imbalance) in enumerate(data.tensor_imbalances().items()):
        in_lane_order, balanced = data.encoder_costs[:, :, number]
        name = f"data/encoder_imbalance_over_ranks/{encoder}"
        figures[f"data/encoder_imbalance/{encoder}"] = Figure(imbalance, fmean)
        figures[name] = Figure(balanced, _imbalance)
        figures[f"{name}_in_lane_order"] = Figure(in_lane_order, _imbalance)
    return figures


@dataclass
class _Window:
    """Sums since the last line, of this rank's data-parallel share."""

    began: float
    steps: int = 0
    rows: int = 0
    positions: int = 0
    flops: float = 0.0
    wait_s: float = 0.0


class StepFigures:
    """Measures the steps between two lines on every rank, and gathers the figures on the first."""

    def __init__(self, config: RunConfig, topology: Topology, timer: PartTimer) -> None:
        """Start measuring.

        Args:
            timer: of the parts of the steps on this rank.
        """
        self._config, self._topology, self._timer = config, topology, timer
        self._peak_tflops = config.monitor.peak_tflops or _peak_tflops(topology, config)
        self.begin()

    def begin(self) -> None:
        """Forget what was measured since the last line."""
        self._window = _Window(time.perf_counter())

    def count(self, batches: BatchCounts | None, wait_s: float) -> None:
        """Add one step.

        Args:
            batches: what it was trained on; None where another rank with the same rows counts.
            wait_s: seconds that the step waited for them.
        """
        window = self._window
        window.steps += 1
        window.wait_s += wait_s
        if batches is not None:
            window.rows += batches.rows
            window.positions += batches.positions
            window.flops += batches.flops

    def leave_out(self, seconds: float) -> None:
        """Take time that was no part of a step out of the window."""
        self._window.began += seconds

    def gather(
        self, result: StepResult, rate: float, of_data: Mapping[str, Figure] | None
    ) -> dict[str, float]:
        """The figures of a step and of the window since the last call; on the first rank, else none.

        Args:
            rate: the learning rate.
            of_data: of this data-parallel rank, see `data_figures`; None but on the first rank that works on
                its rows.

        Collective: all ranks.
        """
        window, now = self._window, time.perf_counter()
        self._window = _Window(now)
        seconds = max(now - window.began, 1e-9)
        mine = self._of_rank(window, seconds)
        if of_data is not None:
            mine |= self._of_data_rank(window, seconds) | dict(of_data)
        is_first = self._topology.rank == 0
        by_rank: list[Any] = [None] * self._topology.world_size
        dist.gather_object(mine, by_rank if is_first else None)
        return self._of_step(result, rate) | reduce_over_ranks(by_rank) if is_first else {}

    def _of_step(self, result: StepResult, rate: float) -> dict[str, float]:
        """What the step has added up over ranks itself."""
        sums, counts = result.loss_sums.tolist(), result.loss_counts.tolist()
        figures = {"loss/all": sum(sums) / max(sum(counts), 1.0)}
        for name, total, count in zip(self._config.data.sources, sums, counts, strict=True):
            if count:
                figures[f"loss/{name}"] = total / count
        for name, part in result.parts.items():
            total, count = part.tolist()
            figures[name] = total / max(count, 1.0)
        figures["optimizer/learning_rate"] = rate
        figures["optimizer/gradient_norm"] = float(result.norms.joint)
        for name, norm in result.norms.parts.items():
            figures[f"optimizer/gradient_norm_{name}"] = float(norm)
        figures["optimizer/skipped_steps"] = int(result.skipped_steps)
        return figures

    def _of_rank(self, window: _Window, seconds: float) -> dict[str, Figure]:
        figures = {"speed/step_seconds": Figure(seconds / window.steps, fmean)}
        for name, total in self._timer.read().items():
            figures[f"time/step/{name}"] = Figure(total / window.steps, fmean)
        name, gib = _memory_gib(self._topology.device)
        figures[name] = Figure(gib, max)
        return figures

    def _of_data_rank(self, window: _Window, seconds: float) -> dict[str, Figure]:
        """Work that the ranks with the same rows share, by the first of them."""
        tflops_per_rank = window.flops / seconds / self._topology.rows_size / 1e12
        figures = {
            "speed/tokens_per_second": Figure(window.positions / seconds, sum),
            "speed/rows_per_second": Figure(window.rows / seconds, sum),
            "speed/data_wait_share": Figure(window.wait_s / seconds, fmean),
            "speed/model_tflops_per_rank": Figure(tflops_per_rank, fmean),
            "time/step/data_wait": Figure(window.wait_s / window.steps, fmean),
        }
        if self._peak_tflops:
            figures["speed/model_flops_utilisation"] = Figure(tflops_per_rank / self._peak_tflops, fmean)
        return figures


def _imbalance(costs: Sequence[np.ndarray]) -> float:
    """Of an encoder's work in each micro-batch [micro-batches], by data-parallel rank."""
    return float(imbalance_over_ranks(np.stack(costs)[..., None])[0])


def _memory_gib(device: torch.device) -> tuple[str, float]:
    if device.type == "cuda":
        return "memory/peak_gib", torch.cuda.max_memory_allocated(device) / 2**30
    with Path("/proc/self/status").open() as status:
        (line,) = (line for line in status if line.startswith("VmRSS:"))
    return "memory/resident_gib", int(line.split()[1]) / 2**20


def _peak_tflops(topology: Topology, config: RunConfig) -> float | None:
    if topology.device.type != "cuda" or config.training.precision != "bf16":
        return None
    device = device_by_driver_name(torch.cuda.get_device_name(topology.device))
    return None if device is None else device.peak_tflops
