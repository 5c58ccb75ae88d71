"""Engines in bf16: near fp32 on every layout, bit for bit after a resume, and gradients added up in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distributed.ranks import run_ranks

STEPS, HALF = 4, 2
TOLERANCE = 2e-2
"""Of losses near 4.5 nats, which bf16 knows to 1.6e-2."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2, ZeRO 1 and 1": {"zero": "1,1"},
    "dp2, ZeRO 3 and 3": {"zero": "3,3"},
    "tp2, ZeRO 1 and 3, fp32 gradients": {
        "zero": "1,3",
        "tensor": 2,
        "sequence_parallel": True,
        "fp32_gradients": True,
    },
    "dp2, ZeRO 2 and 2, fp32 gradients": {"zero": "2,2", "fp32_gradients": True},
    "dp2, ZeRO 3 and 1, fp32 gradients": {"zero": "3,1", "fp32_gradients": True},
    "dp2, ZeRO 2 and 3 with offload, fp32 gradients": {"zero": "2_offload,3_offload", "fp32_gradients": True},
}
RESUMED = list(LAYOUTS)[:3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each layout measured, by name; those that resume have two halves as well, and one moves."""
    layouts = {"fp32": {"zero": "1,1", "steps": STEPS}}
    for name, layout in LAYOUTS.items():
        layout = {**layout, "precision": "bf16"}
        layouts[name] = {**layout, "steps": STEPS}
        if name in RESUMED:
            layouts[f"{name}, half"] = {**layout, "steps": HALF}
            layouts[f"{name}, resumed"] = {**layout, "steps": STEPS - HALF, "resume": f"{name}, half"}
    moved = {**LAYOUTS["dp2, ZeRO 3 and 1, fp32 gradients"], "precision": "bf16"}
    layouts["moved"] = {**moved, "steps": STEPS - HALF, "resume": f"{RESUMED[2]}, half"}
    words = (json.dumps({"name": name, **layout}) for name, layout in layouts.items())
    results = run_ranks("train_layouts", 2, str(tmp_path_factory.mktemp("bf16")), *words)
    assert [result["name"] for result in results] == list(layouts)
    return {result["name"]: result for result in results}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_near_those_of_fp32(name: str, trained: dict[str, Any]) -> None:
    found, expected = trained[name]["losses"], trained["fp32"]["losses"]
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert found != expected, "it did not run in bf16"
    assert trained[name]["drift"] == []


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_repeats_the_losses_bit_for_bit(name: str, trained: dict[str, Any]) -> None:
    halves = trained[f"{name}, half"]["losses"] + trained[f"{name}, resumed"]["losses"]
    assert halves == trained[name]["losses"]


def test_a_run_goes_on_with_other_ranks_and_stages(trained: dict[str, Any]) -> None:
    assert trained["moved"]["losses"] == pytest.approx(trained["fp32"]["losses"][HALF:], abs=TOLERANCE)


def test_fp32_adds_up_64_micro_batches_with_less_error(tmp_path: Path) -> None:
    (errors,) = run_ranks("add_up_gradients", 1, str(tmp_path), "1,1", "2,2", "3,3")
    in_bf16 = errors.pop("in bf16")
    assert len(errors) == 3
    for stages, in_fp32 in errors.items():
        assert 0 < in_fp32 < 0.75 * in_bf16, stages
