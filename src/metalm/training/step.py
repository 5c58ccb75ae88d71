"""One optimizer step: forward through both engines, one backward, one joint norm, both step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from metalm.batch import SemiCausalBatch
from metalm.objectives import Objective
from metalm.parallel.topology import Topology
from metalm.training.engines import RATE_RATIO, Engines
from metalm.training.gradient_norm import GradientNorms, JointNorm
from metalm.training.guards import FINE, StepGuard
from metalm.training.replicas import unify_gradients
from metalm.training.timing import PartTimer
from metalm.training.upload import Uploads


@dataclass(frozen=True)
class StepResult:
    """What a step measured, as device tensors: reading them waits for the device."""

    loss_sums: Tensor  # [sources] float64, nats over the trained positions of the global batch
    loss_counts: Tensor  # [sources] float64, trained positions
    parts: dict[str, Tensor]
    """What the loss is made of, as `OBJECTIVE/PART`: [2] float64, sum and count."""
    norms: GradientNorms
    verdict: Tensor
    """Of the guard: int64. Neither engine moves unless it is FINE."""
    skipped_steps: Tensor
    """Steps so far, over all resumes, that the guard refused: int64."""


def sum_by_source(values: Tensor, batch: SemiCausalBatch, num_sources: int) -> Tensor:
    """Row sums of [B, S] values, added up by the rows' source: [sources] float64."""
    sums = torch.zeros(num_sources, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, batch.source_ids, values.double().sum(dim=1))


class TrainStep:
    """Runs optimizer steps on the micro-batches of this rank."""

    def __init__(
        self,
        engines: Engines,
        topology: Topology,
        num_sources: int,
        guard: StepGuard,
        objective: Objective,
    ) -> None:
        self._engines = engines
        self._objective = objective
        self._guard = guard
        self._topology = topology
        self._num_sources = num_sources
        self._joint_norm = JointNorm(engines.trained())
        self._uploads = Uploads(topology.device, topology.rows_rank)
        self.timer = PartTimer(topology.device)

    def begin(self, micro_batches: Sequence[SemiCausalBatch]) -> None:
        """Start copying the first micro-batch of the next step to the device, beside the step that runs.

        Args:
            micro_batches: what `run` is given next.
        """
        self._uploads.begin(micro_batches[0])

    def run(self, micro_batches: Sequence[SemiCausalBatch], learning_rate: float) -> StepResult:
        """Accumulate over the micro-batches and update both engines, unless the guard refuses the step.

        The loss is the sum over trained positions divided by those of the whole global batch: ZeRO averages
        the decoder over data and context ranks, hence the factor; the encoders' part of it is in
        `gather_encoded`.

        Args:
            micro_batches: this data-parallel rank's, in host memory, alike on all ranks that work on its
                rows; as many as the engines accumulate.
            learning_rate: of this step, of components without one of their own.

        Collective: all ranks.
        """
        topology = self._topology
        counts = self._count(micro_batches)
        dist.all_reduce(counts, group=topology.data_group)
        scale = topology.replica_size / counts.sum().clamp(min=1.0)
        sums = torch.zeros_like(counts)
        parts: dict[str, Tensor] = {}
        with self.timer.part("forward_backward"):
            for number, batch in enumerate(micro_batches):
                if number:
                    self._step_engines()
                with self._uploads.use(batch) as uploaded:
                    if number + 1 < len(micro_batches):
                        self._uploads.begin(micro_batches[number + 1])
                    self._forward_backward(uploaded, scale, sums, parts)
        with self.timer.part("optimizer"), record_function("optimizer"):
            unify_gradients(self._engines.decoder, topology)
            norms = self._joint_norm.measure()
            dist.all_reduce(sums, group=topology.replica_group)
            if parts:
                together = torch.stack(list(parts.values()))
                dist.all_reduce(together, group=topology.replica_group)
                parts = dict(zip(parts, together, strict=True))
            verdict = self._guard.judge(sums, counts, norms.joint)
            self._joint_norm.refuse(verdict != FINE)
            for engine in self._engines.trained().values():
                for group in engine.optimizer.param_groups:
                    group["lr"] = learning_rate * group[RATE_RATIO]
            self._step_engines()
        return StepResult(sums, counts, parts, norms, verdict, self._guard.skipped[1:].sum())

    def _count(self, micro_batches: Sequence[SemiCausalBatch]) -> Tensor:
        """Trained positions of this rank's rows by source, [sources] float64 on the device."""
        weights = [sum_by_source(batch.loss_weights, batch, self._num_sources) for batch in micro_batches]
        counts = torch.stack(weights).sum(dim=0)
        device = self._topology.device
        return counts if device.type == "cpu" else counts.pin_memory().to(device, non_blocking=True)

    def _forward_backward(
        self, batch: SemiCausalBatch, scale: Tensor, sums: Tensor, parts: dict[str, Tensor]
    ) -> None:
        """Add a micro-batch's gradients, and what was measured of it to `sums` [sources] and `parts`."""
        with record_function("forward"):
            losses = self._objective.losses(self._engines, batch, self._topology)
        with record_function("backward"):
            self._engines.backward((losses.weighted.sum() * scale).float())
        sums += sum_by_source(losses.weighted.detach(), batch, self._num_sources)
        for name, part in losses.parts.items():
            key = f"{self._objective.name}/{name}"
            parts[key] = parts.get(key, 0.0) + part

    def _step_engines(self) -> None:
        """Advance the accumulation; at its boundary, update."""
        for engine in self._engines.by_component().values():
            engine.step()
