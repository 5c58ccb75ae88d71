"""What operators see of a run: TensorBoard, a metrics file, and a line with the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from metalm.data.pictures import caption_picture
from metalm.model.flops import count_training_flops
from metalm.parallel.topology import Topology
from metalm.training.evaluate import Sample
from metalm.training.metrics import append_metrics, drop_superseded
from metalm.training.step import StepResult

PEAK_TFLOPS_BF16 = {
    # Dense tensor-core peaks from the vendors' data sheets; the first name found in the device's name holds.
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}


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

    def __init__(self, config: RunConfig, topology: Topology, run_folder: Path, first_step: int) -> None:
        """Open the outputs. What they hold of `first_step` and later, from before a resume, is superseded."""
        self._config = config
        self._topology = topology
        self._window = _Window(time.perf_counter())
        self._began, self._first_step = time.perf_counter(), first_step
        self._peak_tflops = config.monitor.peak_tflops or _peak_tflops(topology, config)
        self._writer: SummaryWriter | None = None
        self._run_folder = run_folder
        if topology.rank == 0:
            self._writer = SummaryWriter(run_folder / "tensorboard", purge_step=first_step)
            drop_superseded(run_folder, first_step)

    def count(self, micro_batches: list[SemiCausalBatch], wait_s: float) -> None:
        """Add one step's batches, in host memory, and the seconds that the step waited for them."""
        window = self._window
        window.steps += 1
        window.wait_s += wait_s
        for batch in micro_batches:
            window.rows += batch.tokens.shape[0]
            window.positions += int((batch.attention_end > batch.attention_start).sum())
            window.flops += count_training_flops(batch, self._config.model)

    def log_step(self, step: int, result: StepResult, rate: float, data: TrainingData | None) -> None:
        """Write the figures of a step and of the window since the last call.

        Args:
            data: of this data-parallel rank; None on tensor ranks above 0.

        Collective: all ranks.
        """
        window, now = self._window, time.perf_counter()
        seconds = max(now - window.began, 1e-9)
        sums = torch.tensor([window.rows, window.positions, window.flops, window.wait_s], dtype=torch.float64)
        dist.all_reduce(sums, group=self._topology.data_group)
        told: list[Any] = [None] * self._topology.world_size
        own = None if data is None else (data.counters(), data.encoder_costs)
        dist.gather_object(own, told if self._topology.rank == 0 else None)
        self._window = _Window(now)
        if self._writer is None:
            return
        parts = [part for part in told if part is not None]
        rows, positions, flops, wait_s = sums.tolist()
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
            "speed/tokens_per_second": positions / seconds,
            "speed/rows_per_second": rows / seconds,
            "speed/step_seconds": seconds / window.steps,
            "speed/data_wait_share": wait_s / self._topology.data_size / seconds,
            "speed/model_tflops_per_rank": rate_tflops,
            **_memory_gib(self._topology.device),
            **_add_counters([counters for counters, _ in parts]),
            **self._imbalances(np.stack([costs for _, costs in parts])),
        }
        if self._peak_tflops:
            figures["speed/model_flops_utilisation"] = rate_tflops / self._peak_tflops
        self.write(step, figures)
        print(self._line(step, figures), flush=True)

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
        print(f"held out at step {step}: " + "  ".join(f"{n} {v:.4f}" for n, v in losses.items()), flush=True)

    def write_samples(self, step: int, samples: list[Sample]) -> None:
        """Show captions under their images, and continuations as text. Rank 0 calls it."""
        assert self._writer is not None
        for number, sample in enumerate(samples):
            tag = f"{sample.source}/{number}"
            if sample.image is None:
                text = (
                    f"**text**\n\n{_quoted(sample.reference)}\n\n**continued**\n\n{_quoted(sample.generated)}"
                )
                self._writer.add_text(tag, text, step)
            else:
                lines = [f"generated: {sample.generated}", f"reference: {sample.reference}"]
                picture = caption_picture(sample.image, lines)
                self._writer.add_image(tag, picture, step, dataformats="HWC")

    def write_text(self, name: str, text: str) -> None:
        """Show a text of the run, such as its config. Rank 0 calls it."""
        assert self._writer is not None
        self._writer.add_text(name, _quoted(text), self._first_step)

    def restart_window(self) -> None:
        """Forget the time since the last line: it went into evaluation or saving."""
        self._window.began = time.perf_counter()

    def close(self) -> None:
        """Flush and close the outputs."""
        if self._writer is not None:
            self._writer.close()

    def _losses(self, result: StepResult) -> dict[str, float]:
        sums, counts = result.loss_sums.tolist(), result.loss_counts.tolist()
        figures = {"loss/all": sum(sums) / max(sum(counts), 1.0)}
        for name, total, count in zip(self._config.data.sources, sums, counts, strict=True):
            if count:
                figures[f"loss/{name}"] = total / count
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
    name = torch.cuda.get_device_name(topology.device)
    return next((peak for known, peak in PEAK_TFLOPS_BF16.items() if known in name), None)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _quoted(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
