"""What operators see of a run: TensorBoard, a metrics file, and a line with the time left."""

from __future__ import annotations

import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from metalm.batch import SemiCausalBatch
from metalm.config import RunConfig
from metalm.data.balance import imbalance_over_ranks
from metalm.data.loader import TrainingData
from metalm.evaluation.generation import Sample
from metalm.modalities import MEDIA
from metalm.model.flops import count_training_flops
from metalm.parallel.topology import Topology
from metalm.planning.devices import device_by_driver_name
from metalm.training.dashboard import mask_pictures, write_key_values, write_page
from metalm.training.metrics import RESTARTS, append_metrics, count_starts, drop_superseded
from metalm.training.step import StepResult
from metalm.training.timing import PartTimer

logger = logging.getLogger(__name__)


def _despite_a_full_disk(method: Callable[..., None]) -> Callable[..., None]:
    """What cannot be written is told once and given up: the training is worth more than its figures."""

    @functools.wraps(method)
    def attempt(self: Monitor, *arguments: Any) -> None:
        try:
            self._mend()
            method(self, *arguments)
        except OSError as error:
            if not self._is_broken:
                logger.error("figures cannot be written: %s; the training goes on", error)
            self._is_broken = True

    return attempt


@dataclass
class _Window:
    """Sums since the last line, of this rank's data-parallel share."""

    began: float
    steps: int = 0
    rows: int = 0
    positions: int = 0
    flops: float = 0.0
    wait_s: float = 0.0


class Monitor:
    """Collects figures on all ranks; rank 0 writes them."""

    def __init__(
        self,
        config: RunConfig,
        objective_name: str,
        topology: Topology,
        run_folder: Path,
        first_step: int,
        timer: PartTimer,
    ) -> None:
        """Open the outputs. What they hold of `first_step` and later, from before a resume, is superseded."""
        self._config = config
        self._objective_name = objective_name
        self._topology = topology
        self._peak_tflops = config.monitor.peak_tflops or _peak_tflops(topology, config)
        self._timer = timer
        self._writer: SummaryWriter | None = None
        self._shown: set[str] = set()
        self._run_folder = run_folder
        self._is_broken = False
        self._restarts = count_starts(run_folder) if topology.rank == 0 else 0
        self.begin(first_step)

    def begin(self, first_step: int) -> None:
        """Go on from a step, at the start or after going back to a checkpoint."""
        self._window = _Window(time.perf_counter())
        self._began, self._first_step = time.perf_counter(), first_step
        self._masks_are_drawn = False
        self.close()
        if self._topology.rank == 0:
            self._writer = SummaryWriter(self._run_folder / "tensorboard", purge_step=first_step)
            drop_superseded(self._run_folder, first_step)
            self._open_page()

    def count(self, micro_batches: list[SemiCausalBatch], wait_s: float) -> None:
        """Add one step's batches, in host memory, and the seconds that the step waited for them."""
        window = self._window
        window.steps += 1
        window.wait_s += wait_s
        for batch in micro_batches:
            window.rows += batch.tokens.shape[0]
            window.positions += int((batch.attention_end > batch.attention_start).sum())
            window.flops += count_training_flops(batch, self._config.model)
        if self._writer is not None and not self._masks_are_drawn:
            self._masks_are_drawn = True
            self._draw_masks(micro_batches[0])

    def log_step(
        self,
        step: int,
        result: StepResult,
        rate: float,
        data: TrainingData | None,
        fingerprint: int,
        guards: Mapping[str, float],
    ) -> None:
        """Write the figures of a step and of the window since the last call.

        Args:
            data: of this data-parallel rank; None on tensor ranks above 0.
            fingerprint: of this data-parallel rank's rows of the step; 0 on tensor ranks above 0.
            guards: what the guards count.

        Collective: all ranks.
        """
        window, now = self._window, time.perf_counter()
        seconds = max(now - window.began, 1e-9)
        sums = torch.tensor([window.rows, window.positions, window.flops, window.wait_s], dtype=torch.float64)
        dist.all_reduce(sums, group=self._topology.data_group)
        told: list[Any] = [None] * self._topology.world_size
        counted = (
            None if data is None else ({**data.counters(), "fingerprint": fingerprint}, data.encoder_costs)
        )
        mine = (self._timer.read(), counted)
        dist.gather_object(mine, told if self._topology.rank == 0 else None)
        self._window = _Window(now)
        if self._writer is None:
            return
        parts = [part for _, part in told if part is not None]
        rows, positions, flops, wait_s = sums.tolist()
        data_wait_s = wait_s / self._topology.data_size
        rate_tflops = flops / seconds / self._topology.world_size / 1e12
        figures = {
            **self._losses(result),
            "optimizer/learning_rate": rate,
            "optimizer/gradient_norm": float(result.norms.joint),
            **{
                f"optimizer/gradient_norm_{name}": float(norm)
                for name, norm in zip(("decoder", "encoders"), result.norms.parts, strict=False)
            },
            "optimizer/skipped_steps": result.skipped_steps,
            **guards,
            "speed/tokens_per_second": positions / seconds,
            "speed/rows_per_second": rows / seconds,
            "speed/step_seconds": seconds / window.steps,
            "speed/data_wait_share": data_wait_s / seconds,
            "speed/model_tflops_per_rank": rate_tflops,
            "time/step/data_wait": data_wait_s / window.steps,
            **{
                f"time/step/{name}": total / window.steps
                for name, total in _mean([timed for timed, _ in told]).items()
            },
            RESTARTS: self._restarts,
            **_memory_gib(self._topology.device),
            **_add_counters([counters for counters, _ in parts]),
            **self._imbalances(np.stack([costs for _, costs in parts])),
        }
        if self._peak_tflops:
            figures["speed/model_flops_utilisation"] = rate_tflops / self._peak_tflops
        self.write(step, figures)
        self.say(self._line(step, figures))

    @_despite_a_full_disk
    def say(self, line: str) -> None:
        """Print a line. Rank 0 calls it."""
        print(line, flush=True)

    @_despite_a_full_disk
    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write scalars of a step. Rank 0 calls it."""
        assert self._writer is not None
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        append_metrics(self._run_folder, step, figures)
        self._writer.flush()

    def write_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Write held-out losses and print them. Rank 0 calls it."""
        self.write(step, {f"held_out/{name}": loss for name, loss in losses.items()})
        self.say(f"held out at step {step}: " + "  ".join(f"{n} {v:.4f}" for n, v in losses.items()))

    @_despite_a_full_disk
    def write_samples(self, step: int, samples: list[Sample]) -> None:
        """Show captions under their images or beside their clips, and continuations as text.

        Rank 0 calls it.
        """
        assert self._writer is not None
        captions: dict[str, list[str]] = {}
        for number, sample in enumerate(samples):
            tag = f"{sample.source}/{number}"
            if sample.media is None:
                text = (
                    f"**text**\n\n{_quoted(sample.reference)}\n\n**continued**\n\n{_quoted(sample.generated)}"
                )
                self._writer.add_text(tag, text, step)
                continue
            lines = [f"generated: {sample.generated}", f"reference: {sample.reference}"]
            modality = MEDIA[sample.modality]
            modality.show(self._writer, tag, sample.media, lines, step, first=tag not in self._shown)
            self._shown.add(tag)
            captions.setdefault(sample.source, []).append("\n".join([f"{modality.noun} {number}", *lines]))
        for source, entries in captions.items():
            self._writer.add_text(f"captions/{source}", _quoted("\n\n".join(entries)), step)
        self._writer.flush()

    @_despite_a_full_disk
    def write_text(self, name: str, text: str) -> None:
        """Show a text of the run, such as its config. Rank 0 calls it."""
        assert self._writer is not None
        self._writer.add_text(name, _quoted(text), self._first_step)

    @contextmanager
    def apart(self, name: str, step: int) -> Iterator[None]:
        """Time what is no part of a step, such as saving, and keep it out of the figures of steps."""
        if self._topology.device.type == "cuda":
            torch.cuda.synchronize(self._topology.device)  # the step before it is not its time
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._window.began += seconds
        if self._writer is not None:
            self.write(step, {f"time/apart/{name}": seconds})

    def close(self) -> None:
        """Flush and close the outputs."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):  # told when it was written
                writer.close()

    def _mend(self) -> None:
        """Open TensorBoard's writer again, if the disk was full: its thread has died of that."""
        if self._is_broken:
            self._writer = SummaryWriter(self._run_folder / "tensorboard")
            self._is_broken = False

    @_despite_a_full_disk
    def _draw_masks(self, batch: SemiCausalBatch) -> None:
        assert self._writer is not None
        for name, picture in mask_pictures(batch).items():
            self._writer.add_image(f"mask/{name}", picture, self._first_step, dataformats="HWC")

    def _open_page(self) -> None:
        """What TensorBoard shows of the run itself, and of this start."""
        assert self._writer is not None
        write_page(self._writer)
        write_key_values(self._writer, self._config)
        started = {
            "restarts": self._restarts,
            "first step": max(1, self._first_step),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "host of rank 0": socket.gethostname(),
            "Slurm job": os.environ.get("SLURM_JOB_ID", "none"),
            "layout": self._topology.describe(),
        }
        self.write_text("start", "\n".join(f"{name:<16}{value}" for name, value in started.items()))
        # Before the first line of figures, too: a start that ends before it counts.
        append_metrics(self._run_folder, max(0, self._first_step - 1), {RESTARTS: self._restarts})

    def _losses(self, result: StepResult) -> dict[str, float]:
        sums, counts = result.loss_sums.tolist(), result.loss_counts.tolist()
        figures = {"loss/all": sum(sums) / max(sum(counts), 1.0)}
        for name, total, count in zip(self._config.data.sources, sums, counts, strict=True):
            if count:
                figures[f"loss/{name}"] = total / count
        for name, part in result.parts.items():
            total, count = part.tolist()
            figures[f"{self._objective_name}/{name}"] = total / max(count, 1.0)
        return figures

    def _imbalances(self, costs: np.ndarray) -> dict[str, float]:
        """Of the last step's encoder work over data ranks; costs [ranks, 2, micro-batches, encoders]."""
        before, after = (imbalance_over_ranks(costs[:, arrangement]) for arrangement in (0, 1))
        figures = {}
        for number, name in enumerate(self._config.model.encoders):
            figures[f"data/encoder_imbalance_over_ranks/{name}"] = float(after[number])
            figures[f"data/encoder_imbalance_over_ranks/{name}_in_lane_order"] = float(before[number])
        return figures

    def _line(self, step: int, figures: Mapping[str, float]) -> str:
        total = self._config.training.steps
        elapsed = time.perf_counter() - self._began
        left_s = elapsed / (step - self._first_step + 1) * (total - step)
        by_source = "  ".join(
            f"{name.removeprefix('loss/')} {value:.3f}"
            for name, value in figures.items()
            if name.startswith("loss/") and name != "loss/all"
        )
        return (
            f"step {step}/{total}  loss {figures['loss/all']:.4f} ({by_source})  "
            f"rate {figures['optimizer/learning_rate']:.2e}  norm {figures['optimizer/gradient_norm']:.2f}  "
            f"{figures['speed/tokens_per_second']:.0f} tokens/s  "
            f"data wait {figures['speed/data_wait_share']:.0%}  left {_clock(left_s)}"
        )


def _mean(told: list[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by part, averaged over ranks."""
    names = {name: None for seconds in told for name in seconds}
    return {name: sum(seconds.get(name, 0.0) for seconds in told) / len(told) for name in names}


def _add_counters(parts: list[Mapping[str, int | float]]) -> dict[str, float]:
    """Counts added over data-parallel ranks; epochs by the least, imbalances by the mean."""
    figures: dict[str, float] = {}
    for name in sorted({name for part in parts for name in part}):
        values = [part[name] for part in parts if name in part]
        if name.endswith("/epoch"):
            figures[f"data/{name}"] = min(values)
        elif name.startswith("encoder_imbalance/"):
            figures[f"data/{name}"] = sum(values) / len(values)
        else:
            figures[f"data/{name}"] = sum(values)
    figures["data/skipped_samples"] = sum(n for name, n in figures.items() if "/skipped/" in name)
    return figures


def _memory_gib(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    with Path("/proc/self/status").open() as status:
        (line,) = (line for line in status if line.startswith("VmRSS:"))
    return {"memory/resident_gib": int(line.split()[1]) / 2**20}


def _peak_tflops(topology: Topology, config: RunConfig) -> float | None:
    if topology.device.type != "cuda" or config.training.precision != "bf16":
        return None
    device = device_by_driver_name(torch.cuda.get_device_name(topology.device))
    return None if device is None else device.peak_tflops


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _quoted(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
