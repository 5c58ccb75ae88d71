"""Components with a peak of their own follow the one schedule, through warm-up, stable phase and decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed.tiny import global_batch, micro_batches
from metalm.objectives.semi_causal import SemiCausal
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.schedule import learning_rate
from metalm.training.step import TrainStep
from training.test_start import config_with


def test_every_component_has_its_own_peak_s_share(
    topology: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    config = config_with(
        tmp_path,
        training__steps=40,
        training__micro_batch_size=8,
        training__optimizer__learning_rate=1e-3,
        training__optimizer__learning_rates={"decoder": 4e-3, "connectors": {"image": 2e-4}},
        training__schedule={"warmup_steps": 4, "decay": "linear", "decay_steps": 20},
    )
    engines = build_engines(config, topology)
    guard = StepGuard(config.guards, config.data.sources, topology.device)
    step = TrainStep(engines, topology, 2, guard, SemiCausal())
    batches = micro_batches(global_batch(0), config, 0, 1)
    for number, share in ((1, 0.25), (12, 1.0), (30, 0.5), (40, 0.0)):
        step.run(batches, learning_rate(number, 1e-3, 40, config.training.schedule))
        found = {
            component: sorted({group["lr"] for group in engine.optimizer.param_groups})
            for component, engine in engines.by_component().items()
        }
        wanted = {"decoder": {share * 4e-3}, "encoders": {share * 2e-4, share * 1e-3}}
        assert found == {name: pytest.approx(sorted(rates)) for name, rates in wanted.items()}
