"""What two ranks on one GPU are compared with, where there is none."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_ranks.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_ranks", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_ranks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_without_a_library_it_is_told_why_nothing_ran(tool: ModuleType, tmp_path: Path) -> None:
    records: list[dict[str, object]] = []
    given = tmp_path / "libnccl.so.2"
    tool.check_ranks(tmp_path / "out", records.append, nccl=given, on_cpu=False, seconds=1)
    assert records == [{"not_run": f"{given}, given by --nccl, is not there"}]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "shift", "is_fine"), [("tp2", 2e-6, True), ("tp2", 2e-5, False)])
def test_losses_are_fine_within_what_float32_leaves_open(
    tool: ModuleType, tmp_path: Path, name: str, shift: float, is_fine: bool
) -> None:
    write_losses(tmp_path, "one", {step: 6.0 - 0.1 * step for step in range(1, tool.STEPS + 1)})
    write_losses(tmp_path, name, {step: 6.0 + shift - 0.1 * step for step in range(1, tool.STEPS + 1)})
    record = tool.compare(tmp_path, name)
    assert record["largest_difference"] == pytest.approx(shift, rel=1e-3)
    assert record["is_fine"] is is_fine


def test_a_run_that_did_not_go_on_from_its_checkpoint_is_not_fine(tool: ModuleType, tmp_path: Path) -> None:
    losses = {step: 6.0 for step in range(1, tool.STEPS + 1)}
    for name in ("one", "one_resumed_from_tp2"):
        write_losses(tmp_path, name, losses)
    record = tool.compare(tmp_path, "one_resumed_from_tp2")
    assert record["is_fine"] is False
    assert record["steps_with_losses"] == sorted(losses)


def write_losses(folder: Path, name: str, losses: dict[int, float]) -> None:
    logs = folder / "runs" / name / "logs"
    logs.mkdir(parents=True)
    lines = (json.dumps({"step": step, "loss/all": loss}) + "\n" for step, loss in losses.items())
    (logs / "metrics.jsonl").write_text("".join(lines))
    (folder / f"{name}.json").write_text('{"rc": 0, "seconds": 1.0}')
