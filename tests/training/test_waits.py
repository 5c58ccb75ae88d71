"""What the host waits for in a step: nothing of ours, and of DeepSpeed what is named here."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.tiny import global_batch, micro_batches
from metalm.config import RunConfig
from metalm.objectives.semi_causal import SemiCausal
from metalm.training import engines as engines_module
from metalm.training.engines import Engines, build_engines
from metalm.training.guards import StepGuard
from metalm.training.owned_ranges import kept_ranges, optimizer_step
from metalm.training.step import StepResult, TrainStep
from training.host_reads import LOOKS_AT_NORM, HostReads, place
from training.test_start import config_with

Run = Callable[..., StepResult]


@pytest.fixture(autouse=True)
def _as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer that CUDA gets, on the CPU."""
    build = engines_module._build_optimizer
    monkeypatch.setattr(
        engines_module, "_build_optimizer", lambda *arguments: build(*arguments[:-1], torch.device("cuda"))
    )


def config_of(folder: Path, stage: int, precision: str) -> RunConfig:
    content = config_with(folder).model_dump(mode="json")
    content["deepspeed"] = {
        name: f"deepspeed_configs/{name}_zero{stage}.json" for name in ("decoder", "encoders")
    }
    content["training"] |= {"precision": precision, "micro_batch_size": 4}
    for part in (content["model"]["decoder"], *content["model"]["encoders"].values()):
        part |= {"hidden_size": 128, "num_heads": 2}  # what Triton's kernels take
    return RunConfig.model_validate(content)


def step_of(config: RunConfig, topology: Any) -> tuple[Engines, Run]:
    engines = build_engines(config, topology)
    guard = StepGuard(config.guards, config.data.sources, topology.device)
    step = TrainStep(engines, topology, 2, guard, SemiCausal())

    def run(number: int, *, poisoned: bool = False) -> StepResult:
        batches = micro_batches(global_batch(number), config, 0, 1)
        if poisoned:
            weights = batches[0].loss_weights.clone()
            weights[0, 0] = math.nan
            batches[0] = replace(batches[0], loss_weights=weights)
        return step.run(batches, 1e-3)

    return engines, run


@pytest.mark.parametrize("stage", [1, 2])
def test_the_host_looks_at_nothing(stage: int, topology: Any, tmp_path: Path, fused: None) -> None:
    _, run = step_of(config_of(tmp_path, stage, "bf16"), topology)
    for number in range(3):  # DeepSpeed's timer, where it is not turned off, starts with the third
        run(number)
    with HostReads() as reads:
        run(3)
    assert reads.places == []


def test_what_deepspeed_looks_at_otherwise_is_known(topology: Any, tmp_path: Path) -> None:
    _, run = step_of(config_of(tmp_path, 1, "fp32"), topology)
    for number in range(3):
        run(number)
    with HostReads() as reads:
        run(3)
    assert set(reads.places) == {LOOKS_AT_NORM}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_is_refused_as_deepspeed_does_it(
    stage: int, topology: Any, tmp_path: Path, fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masters, moments and counts of updates after steps of which the second has no finite loss."""
    config = config_of(tmp_path, stage, "bf16")
    found: list[dict[str, torch.Tensor]] = []
    for on_device in (True, False):
        if not on_device:
            monkeypatch.setattr(engines_module, "refuses_on_device", lambda *arguments: False)
        engines, run = step_of(config, topology)
        results = [run(number, poisoned=number == 1) for number in range(3)]
        assert [int(result.skipped_steps) for result in results] == [0, 1, 1]
        assert [float(result.norms.joint) >= 0 for result in results] == [True, False, True]
        assert {optimizer_step(engine) for engine in engines.trained().values()} == {2.0}
        found.append(
            {
                f"{component} {name} {state}": values.clone()
                for component, engine in engines.trained().items()
                for name, _, kept in kept_ranges(engine)
                for state, values in kept.states.items()
            }
        )
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.equal(values, theirs[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", [1, 3])
def test_on_cuda_a_step_waits_for_nothing(
    stage: int, topology: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = step_of(config_of(tmp_path, stage, "bf16"), topology)
    for number in range(4):
        run(number)
    waits: list[str] = []

    def record(message: Any = "called a synchronizing operation", *arguments: Any, **options: Any) -> None:
        if "called a synchronizing" in str(message):
            waits.append(place(traceback.extract_stack()))

    torch.cuda.synchronize()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *arguments: record())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", record)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run(4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if stage == 3:  # DeepSpeed's own are listed in `src/metalm/training/README.md`
        waits = [wait for wait in waits if not wait.startswith("deepspeed/")]
    assert waits == []
