"""Which checkpoint a path means, which one takes the place of which, and which go."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.test_checkpoint import flip_a_bit, make_checkpoint
from metalm.checkpoint.folders import find_checkpoint, prune_checkpoints, set_aside
from metalm.checkpoint.format import rank_file
from metalm.checkpoint.names import damaged_name, list_checkpoints, step_folder
from metalm.checkpoint.reader import CheckpointReader
from metalm.errors import CheckpointError
from metalm.run_lock import RunLock


@pytest.mark.parametrize(
    "latest",
    [b"step_00000001\n", b"step_00000009\n", b"", b"\xff\xfe\0", b"step_0+a[$(touch executed)0]\n", None],
)
def test_latest_is_never_asked(tmp_path: Path, latest: bytes | None) -> None:
    run = tmp_path / "run"
    newest = [make_checkpoint(run / "checkpoints", step) for step in (1, 2)][-1]
    (run / "checkpoints" / "latest").unlink()
    if latest is not None:
        (run / "checkpoints" / "latest").write_bytes(latest)
    for path in (run, run / "checkpoints"):
        assert find_checkpoint(path) == newest


@pytest.mark.parametrize("damage", ["manifest.json", "state.json", "decoder/rank_00000.safetensors"])
def test_a_newest_one_that_lacks_a_file_is_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = (make_checkpoint(tmp_path, step) for step in (1, 2))
    (newest / damage).unlink()
    assert find_checkpoint(tmp_path) == older
    assert f"{newest} is passed over" in caplog.text
    shutil.rmtree(older)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoint"):
        find_checkpoint(tmp_path)


def test_a_step_is_one_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "checkpoints", 6)
    (tmp_path / "mine").symlink_to(folder)
    assert find_checkpoint(tmp_path / "mine") == folder
    monkeypatch.chdir(folder)
    assert find_checkpoint(Path()) == folder


def test_a_damaged_one_that_was_set_aside_goes_when_its_step_is_there_again(tmp_path: Path) -> None:
    older, newer, newest = (make_checkpoint(tmp_path, step) for step in (1, 2, 4))
    for folder in (newer, newest):
        (folder / "manifest.json").write_text("{}")
        set_aside(folder)
    aside = [damaged_name(folder) for folder in (newer, newest)]
    assert find_checkpoint(tmp_path) == older
    assert prune_checkpoints(tmp_path, keep_last=1, keep_every_steps=None) == []
    again = make_checkpoint(tmp_path, 3)
    assert prune_checkpoints(tmp_path, keep_last=2, keep_every_steps=None) == [aside[0]]
    assert list_checkpoints(tmp_path) == [older, again] and aside[1].is_dir()


def test_a_damaged_one_that_cannot_be_renamed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path, 1)

    def refuse(*_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    set_aside(folder)
    assert folder.is_dir() and f"{folder} could not be renamed: " in caplog.text


def test_what_is_pruned_is_named_as_it_was(tmp_path: Path) -> None:
    older, _ = (make_checkpoint(tmp_path, step) for step in (1, 2))
    assert prune_checkpoints(tmp_path, keep_last=1, keep_every_steps=None) == [older]


def test_folders_that_only_look_like_steps_are_none(tmp_path: Path) -> None:
    real = make_checkpoint(tmp_path, 3)
    for name in ("step_٠٠٠٠٠٠٠٩", "step_000000003", "step_9", "step_00000009.partial", "step_00000010.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000011").write_text("a file")
    assert list_checkpoints(tmp_path) == [real]


def test_a_step_that_is_there_already_gives_way(tmp_path: Path) -> None:
    """As when the newest checkpoint was damaged, and the run has come to its step again."""
    damaged = make_checkpoint(tmp_path, 1)
    flip_a_bit(damaged / "decoder" / rank_file(0))
    (damaged / "written by hand").write_text("")
    again = make_checkpoint(tmp_path, 1)
    CheckpointReader(again, verify=True)
    assert not (again / "written by hand").exists()
    prune_checkpoints(tmp_path, keep_last=1, keep_every_steps=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_a_link_or_a_file_in_the_place_of_a_step_gives_way(tmp_path: Path) -> None:
    cold = make_checkpoint(tmp_path / "cold", 1)
    hot = tmp_path / "hot"
    hot.mkdir()
    (hot / "step_00000001").symlink_to(cold)
    (hot / "step_00000002").write_text("no folder")
    for step in (1, 2):
        CheckpointReader(make_checkpoint(hot, step), verify=True)
    prune_checkpoints(hot, keep_last=2, keep_every_steps=None)
    assert sorted(path.name for path in hot.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    CheckpointReader(cold, verify=True)


def test_of_a_checkpoint_that_was_moved_and_linked_back_the_link_goes(tmp_path: Path) -> None:
    run, cold = tmp_path / "run", tmp_path / "cold"
    make_checkpoint(run, 1)
    cold.mkdir()
    shutil.move(run / "step_00000001", cold)
    (run / "step_00000001").symlink_to(cold / "step_00000001")
    (run / "step_00000007.partial").symlink_to(cold)
    make_checkpoint(run, 2)
    gone = prune_checkpoints(run, keep_last=1, keep_every_steps=None)
    assert sorted(path.name for path in gone) == ["step_00000001", "step_00000007.partial"]
    assert list_checkpoints(run) == [step_folder(run, 2)]
    CheckpointReader(cold / "step_00000001", verify=True)


def test_what_cannot_be_removed_keeps_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 5):
        make_checkpoint(tmp_path, step)
    remove_tree = shutil.rmtree

    def refuse_first(path: Path) -> None:
        if "step_00000001" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        remove_tree(path)

    monkeypatch.setattr(shutil, "rmtree", refuse_first)
    with pytest.raises(PermissionError):
        prune_checkpoints(tmp_path, keep_last=1, keep_every_steps=None)
    assert list_checkpoints(tmp_path) == [step_folder(tmp_path, 4)]


@pytest.mark.parametrize(
    "named", ["run", "run/checkpoints", ".", "..", "link_to_run", "link_to_checkpoints", "moved/checkpoints"]
)
def test_a_run_at_work_is_not_pruned_however_it_is_named(tmp_path: Path, named: str) -> None:
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    kept = [make_checkpoint(checkpoints, step) for step in (1, 2)]
    (tmp_path / "link_to_run").symlink_to(run)
    (tmp_path / "link_to_checkpoints").symlink_to(checkpoints)
    inside = named in (".", "..")
    held = run
    if named.startswith("moved"):
        held = tmp_path / "moved"
        held.mkdir()
        (held / "checkpoints").symlink_to(checkpoints)
    tool = Path(__file__).parents[2] / "tools/prune_checkpoints.py"
    command = [sys.executable, str(tool), named]
    lock = RunLock(held)
    try:
        found = subprocess.run(
            command, cwd=checkpoints if inside else tmp_path, capture_output=True, text=True, timeout=60
        )
    finally:
        lock.release()
    assert found.returncode == 64 and f"{held} is held by" in found.stderr, found.stderr
    assert list_checkpoints(checkpoints) == kept
