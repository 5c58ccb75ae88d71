"""Traces of chosen steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metalm.config import MonitorConfig
from metalm.training.monitor.profiling import StepProfiler


def profile_two_steps(run_folder: Path) -> None:
    profiler = StepProfiler(MonitorConfig(profile_steps=(1, 2)), 0, run_folder)
    for step in (1, 2, 3):
        with profiler.step(step):
            torch.ones(2, 2) @ torch.ones(2, 2)
    profiler.close()


def test_neighbouring_steps_are_one_trace(tmp_path: Path) -> None:
    profile_two_steps(tmp_path)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name.startswith("rank_00000_step_00000001.") and trace.name.endswith(".pt.trace.json.gz")


def test_a_folder_that_cannot_be_made_is_told_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("in the way")
    profile_two_steps(tmp_path)
    assert caplog.text.count("a trace cannot be written") == 1
