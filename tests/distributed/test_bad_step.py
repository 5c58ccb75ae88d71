"""A gradient that is not finite on one rank: both engines skip the step on all ranks alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed.ranks import run_ranks
from metalm.checkpoint.reader import CheckpointReader


@pytest.mark.parametrize(("decoder", "encoders"), [("1", "3"), ("2", "1")])
def test_both_engines_skip_together(tmp_path: Path, decoder: str, encoders: str) -> None:
    results = run_ranks("skip_bad_step", 2, str(tmp_path), decoder, encoders)
    assert len(results) == 2
    for result in results:
        assert result["skipped"] == [0, 1, 1]
        assert [norm >= 0 for norm in result["norms"]] == [True, False, True]
    first, second, third = (
        CheckpointReader(tmp_path / "checkpoints" / f"step_{step:08d}") for step in (1, 2, 3)
    )
    moved = []
    for component in first.components():
        for name in first.parameters(component):
            for state in ("master", "exp_avg", "exp_avg_sq"):
                assert torch.equal(first.read(component, name, state), second.read(component, name, state)), (
                    name
                )
            moved.append(not torch.equal(second.read(component, name), third.read(component, name)))
    assert all(moved)
    steps = {"decoder": 1.0, "encoders": 1.0}
    assert first.state.optimizer_steps == second.state.optimizer_steps == steps
