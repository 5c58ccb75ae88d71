"""What the training loop tells of a run: figures are measured on all ranks, and shown by the first."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from metalm.batch import SemiCausalBatch
from metalm.config import RunConfig
from metalm.evaluation.generation import Sample
from metalm.parallel.topology import Topology
from metalm.progress import Phase
from metalm.training.monitor.dashboard import mask_pictures
from metalm.training.monitor.figures import BatchCounts, Figure, StepFigures
from metalm.training.monitor.json_lines import RESTARTS, count_starts
from metalm.training.monitor.samples import SamplesShown
from metalm.training.monitor.sink import About
from metalm.training.monitor.sinks import AllSinks, open_sinks
from metalm.training.step import StepResult
from metalm.training.timing import PartTimer

_APART = {
    "evaluate": "evaluating",
    "sample": "generating samples",
    "tasks": "scoring tasks",
    "save": "saving",
}
"""What is no part of a step, as it is told while it takes long."""


class Monitor:
    """Between the training loop and what shows the run. On ranks above 0 nothing is shown."""

    def __init__(
        self, config: RunConfig, topology: Topology, run_folder: Path, first_step: int, timer: PartTimer
    ) -> None:
        """Open the sinks. What they hold of `first_step` and later, from before a resume, is superseded."""
        self._topology = topology
        self._figures = StepFigures(config, topology, timer)
        self._is_first = topology.rank == 0
        self._restarts = count_starts(run_folder) if self._is_first else 0
        self._sinks = open_sinks(config, run_folder, self._restarts) if self._is_first else AllSinks([])
        self._samples = SamplesShown(self._sinks)
        self.begin(first_step)

    def begin(self, first_step: int) -> None:
        """Go on from a step, at the start or after going back to a checkpoint."""
        self._first_step = first_step
        self._masks_are_drawn = False
        self._figures.begin()
        self._sinks.begin(first_step)
        self._describe_start()

    def count(self, batches: BatchCounts | None, wait_s: float) -> None:
        """Add one step: see `StepFigures.count`."""
        self._figures.count(batches, wait_s)

    def show_masks(self, batch: SemiCausalBatch) -> None:
        """Show what sees what in the first micro-batch after `begin`, in host memory."""
        if self._is_first and not self._masks_are_drawn:
            self._masks_are_drawn = True
            for name, picture in mask_pictures(batch).items():
                self._sinks.write_picture(self._first_step, f"mask/{name}", picture)

    def log_step(
        self,
        step: int,
        result: StepResult,
        rate: float,
        of_data: Mapping[str, Figure] | None,
        guards: Mapping[str, float],
    ) -> None:
        """Show the figures of a step and of those since the last call.

        Args:
            guards: what the guards count, on the first rank.

        The others are those of `StepFigures.gather`.

        Collective: all ranks.
        """
        figures = self._figures.gather(result, rate, of_data)
        self._sinks.write(step, {**figures, **guards, RESTARTS: self._restarts}, About.STEPS)

    def say(self, line: str) -> None:
        """Print a line."""
        self._sinks.say(line)

    def write_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Show held-out losses."""
        self._sinks.write(step, {f"held_out/{n}": loss for n, loss in losses.items()}, About.HELD_OUT)

    def write_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Show scores on tasks."""
        self._sinks.write(step, {f"tasks/{n}": score for n, score in scores.items()}, About.TASKS)

    def write_samples(self, step: int, samples: list[Sample]) -> None:
        """Show captions under their images or beside their clips, and continuations as text."""
        self._samples.show(step, samples)

    def write_text(self, name: str, text: str) -> None:
        """Show a text of the run, such as its config."""
        self._sinks.write_text(self._first_step, name, text)

    @contextmanager
    def apart(self, name: str, step: int) -> Iterator[None]:
        """Time what is no part of a step, such as saving, and keep it out of the figures of steps."""
        if self._topology.device.type == "cuda":
            torch.cuda.synchronize(self._topology.device)  # the step before it is not its time
        began = time.perf_counter()
        with Phase(f"{_APART[name]} at step {step}"):
            yield
        seconds = time.perf_counter() - began
        self._figures.leave_out(seconds)
        self._sinks.write(step, {f"time/apart/{name}": seconds}, About.APART)

    def close(self) -> None:
        """Flush and close the sinks."""
        self._sinks.close()

    def _describe_start(self) -> None:
        started = {
            "restarts": self._restarts,
            "first step": max(1, self._first_step),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "host of rank 0": socket.gethostname(),
            "Slurm job": os.environ.get("SLURM_JOB_ID", "none"),
            "layout": self._topology.describe(),
        }
        self.write_text("start", "\n".join(f"{name:<16}{value}" for name, value in started.items()))
