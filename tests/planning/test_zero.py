"""What the planner reads from a DeepSpeed JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metalm.planning.zero import zero_settings


@pytest.mark.parametrize("stage", [1, 3])
def test_a_null_means_what_an_absent_key_means(stage: int, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    nulls = {"offload_optimizer": None, "overlap_comm": None}
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **nulls}}))
    found = zero_settings(path)
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    assert found == zero_settings(path)
    assert (found.overlap, found.offloads_optimizer) == (stage == 3, False)
