"""The training loop between two lines of figures looks at nothing, and traces the steps asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from distributed.ranks import run_ranks
from tiny_pipeline import REPOSITORY
from training.host_reads import LOOKS_AT_NORM

PHASES = ("data wait", "agreement", "forward", "backward", "optimizer")


@pytest.fixture(scope="module")
def watched(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Seven steps, of which the first and the last are logged, 2 and 3 are profiled, and 4 to 6 watched."""
    runs = tmp_path_factory.mktemp("watched")
    settings = ("training.steps=7", "monitor.log_every_steps=100", "monitor.profile_steps=[2,3]")
    fast = (
        "data.evaluation=null",
        "checkpoint.every_steps=100",
        "data.workers=0",
        "guards.drift_every_steps=100",
    )
    average = "training.average={decay: 0.9}"
    (result,) = run_ranks(
        "watch_waits",
        1,
        *("4", "train", str(tiny_data / "tiny.yaml"), f"run.folder={runs}", "run.name=run"),
        *(*settings, *fast, average),
    )
    return runs / "run", result


@pytest.fixture(autouse=True, scope="module")
def _in_repository() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        yield


def test_the_loop_looks_at_nothing_between_two_lines(watched: tuple[Path, dict[str, Any]]) -> None:
    places = watched[1]["places"]
    assert sorted(places) == ["4", "5", "6"]
    for found in places.values():
        assert set(found) == {LOOKS_AT_NORM}  # of fp32: `training/test_waits.py` has a step without any


def test_the_steps_asked_for_are_traced(watched: tuple[Path, dict[str, Any]]) -> None:
    run, result = watched
    assert result["is_profiled"] == [number in (2, 3) for number in range(1, 8)]
    (trace,) = (run / "profile").iterdir()
    assert trace.name.startswith("rank_00000_step_00000002.")
    assert trace.name.endswith(".pt.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert sorted(name for name in names if name.startswith("ProfilerStep")) == [
        "ProfilerStep#2",
        "ProfilerStep#3",
    ]
    for phase in PHASES:
        assert phase in names, phase
    assert names.count("optimizer") == 2
    assert any(event.get("name") == "aten::mm" for event in events)
