"""Starts that are refused, or meet what others have left: nothing changes, or nothing shows."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distributed.ranks import Ranks, wait_until
from faults.harness import content_of_newest, figures
from metalm.checkpoint.folders import is_whole
from metalm.checkpoint.names import list_checkpoints
from metalm.errors import EXIT_DATA, EXIT_USAGE
from metalm.operations.status import describe_run

Start = Callable[..., Ranks]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps on two ranks."""
    run = tmp_path_factory.mktemp("finished") / "run"
    ranks = start(run, "training.steps=10")
    assert ranks.wait() == [0, 0], ranks.output()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    folder = tmp_path / "run"
    for name, content in contents(finished).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_run_that_ended_leaves_no_lock(finished: Path) -> None:
    assert not (finished / "lock").exists()


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("model.decoder.hidden_size=64", EXIT_USAGE, "hidden_size: 32 in the checkpoint, 64 in the config"),
        ("model.decoder.activation=gelu_tanh", EXIT_USAGE, "model.decoder.activation: 'gelu'"),
        ("data.lanes=2", EXIT_USAGE, "lanes"),
        ("data.sources.text.path=absent", EXIT_DATA, "absent"),
    ],
)
def test_a_refused_start_changes_nothing_on_disk(
    start: Start, run: Path, override: str, code: int, message: str
) -> None:
    before = contents(run)
    ranks = start(run, "training.steps=12", override)
    assert ranks.wait(all_by_themselves=True) == [code, code], ranks.output()
    assert message in ranks.output() and "Traceback" not in ranks.output()
    assert contents(run) == before


def test_a_refused_new_run_leaves_no_folder(start: Start, finished: Path, tmp_path: Path) -> None:
    for override in (f"initialize.decoder={tmp_path}", "checkpoint.resume=required"):
        ranks = start(tmp_path / "runs" / "new", override)
        assert ranks.wait(all_by_themselves=True) == [EXIT_DATA] * 2, ranks.output()
    ranks = start(tmp_path / "runs" / "new", f"initialize.decoder={finished}", "model.decoder.hidden_size=64")
    assert ranks.wait(all_by_themselves=True) == [EXIT_DATA] * 2, ranks.output()
    assert "the model needs" in ranks.output()
    assert list(tmp_path.iterdir()) == []


def test_a_second_trainer_is_refused_by_name_and_a_killed_one_followed_at_once(
    start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = start(run, "training.steps=400", fault=("slow_steps", {"seconds": 0.3}))
    assert wait_until(lambda: bool(list_checkpoints(run / "checkpoints")), first)
    second = start(run)
    assert second.wait(all_by_themselves=True) == [EXIT_USAGE] * 2, second.output()
    assert f"is held by process {first.processes[0].pid} on" in second.output()
    first.kill(0)
    assert first.wait()[0] == -signal.SIGKILL
    assert (run / "lock").exists()
    killed = f"state       killed: process {first.processes[0].pid} on "
    assert killed in describe_run(run, time.time())
    last = max(figures(run, "loss/all")) + 5  # the first went on, on a busy machine for long
    third = start(run, f"training.steps={last}")
    assert third.wait() == [0, 0], third.output()
    assert "resumed" in third.output()
    assert sorted(figures(run, "loss/all")) == list(range(1, last + 1))
    assert "state       done\n" in describe_run(run, time.time())
    assert f"done: {last} steps; checkpoint " in third.output()


@pytest.mark.parametrize("damage", ["flipped", "pipe", "recursion", "emptied"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_its_step_saved_again(
    start: Start, run: Path, finished: Path, damage: str
) -> None:
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.name == "step_00000010"
    if damage == "flipped":
        victim = newest / "decoder" / "rank_00001.safetensors"
        victim.write_bytes(victim.read_bytes()[:-1] + b"\x7f")
    elif damage == "pipe":
        (newest / "manifest.json").unlink()
        os.mkfifo(newest / "manifest.json")
    elif damage == "recursion":
        (newest / "manifest.json").write_text("[" * 100_000)
    else:
        (newest / "manifest.json").write_text('{"version": 1, "files": {}}')
    ranks = start(run, "training.steps=10")
    assert ranks.wait() == [0, 0], ranks.output()
    assert "step_00000010 is passed over" in ranks.output()
    assert "step 5 of 10, resumed" in ranks.output()
    assert all(map(is_whole, list_checkpoints(run / "checkpoints")))
    assert content_of_newest(run) == content_of_newest(finished)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        "step_00000005",
        "step_00000010",
    ]


def test_a_damaged_checkpoint_that_was_passed_over_counts_no_more(start: Start, run: Path) -> None:
    newest = list_checkpoints(run / "checkpoints")[-1]
    (newest / "manifest.json").write_text("{}")
    ranks = start(run, "training.steps=8")
    assert ranks.wait() == [0, 0], ranks.output()
    last = run / "checkpoints" / "step_00000008"
    assert f"done: 8 steps; checkpoint {last}" in ranks.output()
    assert list_checkpoints(run / "checkpoints")[-1] == last
    assert newest.with_name("step_00000010.damaged").is_dir()
    assert "checkpoint  step 8, " in describe_run(run, time.time())


def test_lane_states_that_the_manifest_does_not_list_are_not_read(
    start: Start, run: Path, finished: Path
) -> None:
    for folder in list_checkpoints(run / "checkpoints"):
        states = json.loads((folder / "data" / "lanes_00000.json").read_text())
        (folder / "data" / "lanes_00099.json").write_text(json.dumps(dict.fromkeys(states)))
    (run / "checkpoints" / "step_00000010" / "manifest.json").unlink()
    ranks = start(run, "training.steps=10")
    assert ranks.wait() == [0, 0], ranks.output()
    assert content_of_newest(run) == content_of_newest(finished)


def test_what_a_kill_behind_the_last_save_left_is_removed(start: Start, run: Path) -> None:
    checkpoints = run / "checkpoints"
    before = list_checkpoints(checkpoints)
    left = checkpoints / "step_00000005.partial"
    (left / "decoder").mkdir(parents=True)
    (left / "decoder" / "rank_00000.safetensors").write_bytes(b"half of it")
    ranks = start(run, "training.steps=10")
    assert ranks.wait() == [0, 0], ranks.output()
    assert not left.exists()
    assert list_checkpoints(checkpoints) == before


def test_torn_lines_of_figures_do_not_stop_a_resume(start: Start, run: Path, finished: Path) -> None:
    path = run / "logs" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        lines[0] + lines[1][:20] + lines[2] + b"\0" * 512 + b"\n" + b"".join(lines[3:-1]) + b'{"st'
    )
    ranks = start(run, "training.steps=12")
    assert ranks.wait() == [0, 0], ranks.output()
    found, expected = figures(run, "loss/all"), figures(finished, "loss/all")
    assert {11, 12} <= found.keys()
    assert all(found[step] == loss for step, loss in expected.items() if step in found)


def test_a_checkpoint_that_was_moved_away_and_linked_back_is_pruned_as_a_link(
    start: Start, run: Path, tmp_path: Path
) -> None:
    first = run / "checkpoints" / "step_00000005"
    first.rename(tmp_path / "cold")
    first.symlink_to(tmp_path / "cold")
    ranks = start(run, "training.steps=20", "checkpoint.keep_last=2")
    assert ranks.wait() == [0, 0], ranks.output()
    assert "could not be removed" not in ranks.output()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000015", "step_00000020"]
    assert is_whole(tmp_path / "cold")


def test_what_one_rank_may_not_read_all_pass_over(start: Start, run: Path, finished: Path) -> None:
    fault = ("unreadable", {"victim": 1, "part": "step_00000010"})
    ranks = start(run, "training.steps=10", fault=fault)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "cannot be read: Permission denied" in ranks.output()
    assert "step 5 of 10, resumed" in ranks.output()
    assert content_of_newest(run) == content_of_newest(finished)


def test_what_one_rank_cannot_load_all_refuse_together(start: Start, run: Path) -> None:
    before = contents(run)
    fault = ("readable_until_loaded", {"victim": 1, "part": "step_00000010"})
    ranks = start(run, "training.steps=12", fault=fault)
    assert ranks.wait(all_by_themselves=True) == [EXIT_DATA] * 2, ranks.output()
    assert "cannot be read" in ranks.output() and "Traceback" not in ranks.output()
    assert contents(run) == before
