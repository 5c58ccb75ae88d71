"""Which checkpoint is named the best, and that it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalm.checkpoint.best import Best, read_best, write_best
from metalm.checkpoint.folders import find_checkpoint, prune_checkpoints, remove_later
from metalm.config import KeepBestConfig
from metalm.errors import CheckpointError, ConfigError
from metalm.training.best import BestCheckpoint
from metalm.training.monitor.json_lines import append_metrics

FIGURE = "held_out/text"


def folders(run: Path, *steps: int) -> Path:
    for step in steps:
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (run / "logs").mkdir(exist_ok=True)
    return run / "checkpoints"


def named(checkpoints: Path) -> str | None:
    best = read_best(checkpoints)
    return None if best is None else best.folder


def best_of(run: Path, direction: str = "lowest", *, last_step: int = 100) -> BestCheckpoint:
    config = KeepBestConfig(figure=FIGURE, direction=direction)
    return BestCheckpoint(run, config, last_step=last_step, is_first=True)


def test_is_named_once_it_is_published_and_measured(tmp_path: Path) -> None:
    checkpoints = folders(tmp_path, 10)
    best = best_of(tmp_path)
    assert read_best(checkpoints) is None
    best.measured(10, {"text": 3.0, "scenes": 1.0})
    assert read_best(checkpoints) == Best("step_00000010", FIGURE, 3.0)
    best.measured(20, {"text": 2.5})  # still being saved
    assert read_best(checkpoints) == Best("step_00000010", FIGURE, 3.0)
    folders(tmp_path, 20, 30)
    best.settle()
    best.measured(30, {"text": float("nan")})
    assert read_best(checkpoints) == Best("step_00000020", FIGURE, 2.5)
    assert (checkpoints / "best").read_text().splitlines()[0] == "step_00000020"
    assert find_checkpoint(checkpoints / "best") == checkpoints / "step_00000020"


def test_one_that_the_run_has_gone_back_past_is_named_no_more(tmp_path: Path) -> None:
    checkpoints = folders(tmp_path, 10, 20)
    append_metrics(tmp_path, 20, {FIGURE: 2.0})
    best = best_of(tmp_path)
    assert named(checkpoints) == "step_00000020"
    assert remove_later(checkpoints, 10) == [checkpoints / "step_00000020"]
    best.go_back(10)
    assert read_best(checkpoints) is None
    best.measured(10, {"text": 3.0})
    assert named(checkpoints) == "step_00000010"


def test_the_highest_may_be_the_best(tmp_path: Path) -> None:
    best = best_of(tmp_path, "highest")
    checkpoints = folders(tmp_path, 10, 20)
    best.measured(10, {"text": 3.0})
    best.measured(20, {"text": 2.0})
    assert read_best(checkpoints) == Best("step_00000010", FIGURE, 3.0)


def test_a_killed_run_finds_again_what_was_not_named(tmp_path: Path) -> None:
    """From its figures, and from the file where those are gone."""
    checkpoints = folders(tmp_path, 10, 20, 30)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 0.5)):
        append_metrics(tmp_path, step, {FIGURE: loss})
    best_of(tmp_path, last_step=20)
    assert read_best(checkpoints) == Best("step_00000020", FIGURE, 1.0)
    (tmp_path / "logs" / "metrics.jsonl").unlink()
    best_of(tmp_path, last_step=30).measured(30, {"text": 2.0})
    assert read_best(checkpoints) == Best("step_00000020", FIGURE, 1.0)


def test_what_is_given_up_is_no_longer_the_best(tmp_path: Path) -> None:
    checkpoints = folders(tmp_path, 10, 20)
    best = best_of(tmp_path)
    best.measured(10, {"text": 2.0})
    best.measured(20, {"text": 1.0})
    append_metrics(tmp_path, 10, {FIGURE: 2.0})
    best.go_back(10)
    assert read_best(checkpoints) == Best("step_00000010", FIGURE, 2.0)


def test_the_best_is_never_pruned(tmp_path: Path) -> None:
    checkpoints = folders(tmp_path, 10, 20, 30, 40)
    write_best(checkpoints, Best("step_00000020", FIGURE, 1.0))
    prune_checkpoints(checkpoints, 1, None, whole=checkpoints / "step_00000040")
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000020", "step_00000040"]


def test_a_figure_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="held_out/text' is not measured; known: held_out/scenes"):
        best_of(tmp_path).measured(0, {"scenes": 1.0})


@pytest.mark.parametrize("content", ["", "step_00000010\n", "../elsewhere\nheld_out/text\n1.0\n"])
def test_a_damaged_file_names_nothing(tmp_path: Path, content: str) -> None:
    checkpoints = folders(tmp_path, 10)
    (checkpoints / "best").write_text(content)
    assert read_best(checkpoints) is None
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        find_checkpoint(checkpoints / "best")
