"""Traces of chosen steps by torch's profiler, for TensorBoard's profiler tab and for Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, tensorboard_trace_handler

from metalm.config import MonitorConfig

logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps of `monitor.profile_steps`, and leaves all others alone.

    Steps that follow each other are one trace: `profile/rank_RANK_step_FIRST....pt.trace.json.gz` of the run.
    """

    def __init__(self, config: MonitorConfig, rank: int, run_folder: Path) -> None:
        """Stand by; a rank that is not in `monitor.profile_ranks` has nothing to do."""
        self._steps = set(config.profile_steps) if rank in config.profile_ranks else set()
        self._rank, self._folder = rank, run_folder / "profile"
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What runs within is a step. After a profiled one, on CUDA, the device is waited for."""
        if number not in self._steps:
            self.close()  # the run has gone back
            yield
            return
        if self._profile is None:
            self._profile = self._start(number)
        # TensorBoard's tab takes this name for a step.
        with record_function(f"ProfilerStep#{number}"):
            yield
        if number + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Write what was profiled."""
        running, self._profile = self._profile, None
        if running is not None:
            try:
                running.stop()
            except OSError as error:
                logger.error("a trace cannot be written: %s; the training goes on", error)

    def _start(self, first: int) -> profile:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        name = f"rank_{self._rank:05d}_step_{first:08d}"
        write = tensorboard_trace_handler(str(self._folder), name, use_gzip=True)

        def write_trace(finished: profile) -> None:
            self._folder.mkdir(exist_ok=True)  # torch's own attempt raises a RuntimeError
            write(finished)

        started = profile(
            activities=activities,
            record_shapes=True,
            on_trace_ready=write_trace,
        )
        started.start()
        return started
