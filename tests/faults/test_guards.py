"""Harm from inside: each fault is met as the config says, and told."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from distributed.ranks import Ranks, wait_until
from faults.harness import figures, state_of_newest
from metalm.checkpoint.folders import is_whole
from metalm.checkpoint.names import list_checkpoints, step_of
from metalm.checkpoint.reader import CheckpointReader
from metalm.errors import EXIT_FAULT, EXIT_RESTART
from metalm.operations.status import describe_run
from metalm.run_metrics import read_metrics

Start = Callable[..., Ranks]


def test_one_rank_without_a_number_skips_the_step_on_all(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = ("not_a_number", {"victim": 1, "first": 4, "last": 4})
    ranks = start(run, "training.steps=8", fault=fault)
    assert ranks.wait() == [0, 0], ranks.output()
    assert figures(run, "guards/skipped_not_finite") == {step: float(step >= 4) for step in range(1, 9)}
    assert figures(run, "optimizer/gradient_norm")[4] == -1
    state = state_of_newest(run)
    assert state["optimizer_steps"] == {"decoder": 7.0, "encoders": 7.0}
    assert state["guard"]["skipped"] == [7, 1, 0]
    assert "step 4 is skipped: its loss or its gradients are not finite; loss of" in ranks.output()
    assert "OVERFLOW" not in ranks.output()  # as DeepSpeed would call it


def test_too_many_skipped_steps_go_back_to_the_checkpoint_and_past_the_data(
    start: Start, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    limits = ("guards.max_skipped_steps=2", "training.steps=12")
    fault = ("not_a_number", {"victim": 0, "first": 7, "last": 9})
    ranks = start(run, *limits, fault=fault)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "3 steps in a row were skipped up to step 9: back to step 5" in ranks.output()
    undisturbed = tmp_path / "undisturbed"
    assert start(undisturbed, *limits).wait() == [0, 0]
    seen, usual = (figures(folder, "data/fingerprint") for folder in (run, undisturbed))
    assert sorted(seen) == list(range(1, 13))
    assert [seen[step] for step in range(1, 6)] == [usual[step] for step in range(1, 6)]
    assert [seen[step] for step in (6, 7, 8)] == [usual[step] for step in (10, 11, 12)]
    assert figures(run, "guards/rewinds")[12] == 1
    assert all(norm > 0 for norm in figures(run, "optimizer/gradient_norm").values())


def saved_steps(run: Path) -> list[int]:
    return [step_of(folder) for folder in list_checkpoints(run / "checkpoints")]


def is_finite(folder: Path) -> bool:
    """Whether all masters of a checkpoint are."""
    reader = CheckpointReader(folder)
    return all(
        bool(torch.isfinite(reader.read(component, name)).all())
        for component in reader.components()
        for name in reader.parameters(component)
    )


def test_nothing_is_saved_while_steps_are_skipped(start: Start, tmp_path: Path) -> None:
    """The weights of step 4 are gone back to, though checkpoints were due at the skipped steps 6 and 8."""
    run = tmp_path / "run"
    limits = ("guards.max_skipped_steps=2", "training.steps=10", "checkpoint.every_steps=2")
    fault = ("not_a_number", {"victim": 1, "first": 6, "last": 8})
    ranks = start(run, *limits, "checkpoint.keep_last=100", fault=fault)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "3 steps in a row were skipped up to step 8: back to step 4" in ranks.output()
    assert figures(run, "guards/skipped_not_finite")[10] == 3
    assert figures(run, "optimizer/skipped_steps")[10] == 3
    assert saved_steps(run) == [2, 4, 6, 8, 10]


def test_what_is_due_at_a_skipped_step_waits_for_the_next_that_is_taken(
    start: Start, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    limits = ("training.steps=12", "monitor.evaluate_every_steps=5", "monitor.sample_every_steps=100")
    evaluation = f"data.evaluation={{text: {{path: {tiny_data}/text, readers: {{text: text}}}}}}"
    fault = ("not_a_number", {"victim": 1, "first": 4, "last": 6})
    ranks = start(run, *limits, evaluation, fault=fault)
    assert ranks.wait() == [0, 0], ranks.output()
    assert saved_steps(run) == [7, 10, 12]
    assert list(figures(run, "held_out/text")) == [0, 7, 10, 12]


def test_harmed_weights_that_were_saved_are_given_up(start: Start, tmp_path: Path) -> None:
    """An update that nobody has seen is in checkpoint 6; after a rewind to it, one to 4 heals the run."""
    run = tmp_path / "run"
    limits = ("guards.max_skipped_steps=2", "training.steps=12", "checkpoint.every_steps=2")
    ranks = start(run, *limits, "checkpoint.keep_last=2", fault=("poisoned", {"number": 6}))
    assert ranks.wait() == [0, 0], ranks.output()
    assert "3 steps in a row were skipped up to step 9: back to step 6" in ranks.output()
    assert "3 steps in a row were skipped up to step 9: back to step 4" in ranks.output()
    assert "step_00000006 is removed: the run has gone back to step 4" in ranks.output()
    assert all(map(is_finite, list_checkpoints(run / "checkpoints")))
    assert figures(run, "guards/skipped_not_finite")[12] == 6


@pytest.mark.parametrize(("rewinds", "codes"), [(1, [0, 0]), (0, [EXIT_FAULT] * 2)])
def test_a_run_whose_last_step_is_skipped_is_not_done(
    start: Start, tmp_path: Path, rewinds: int, codes: list[int]
) -> None:
    run = tmp_path / "run"
    limits = ("training.steps=10", f"guards.max_rewinds={rewinds}")
    ranks = start(run, *limits, fault=("poisoned", {"number": 8}))
    assert ranks.wait(all_by_themselves=True) == codes, ranks.output()
    assert "the last step, 10, was skipped" in ranks.output()
    assert saved_steps(run) == [5, 10][: 1 + rewinds]
    assert is_finite(list_checkpoints(run / "checkpoints")[-1])


def test_a_run_that_ends_with_harmed_weights_is_not_done(
    start: Start, tiny_data: Path, tmp_path: Path
) -> None:
    """No step has tried the weights of the last one: the held-out loss does."""
    run = tmp_path / "run"
    evaluation = f"data.evaluation={{text: {{path: {tiny_data}/text, readers: {{text: text}}}}}}"
    limits = ("training.steps=10", "guards.max_rewinds=0", evaluation)
    ranks = start(run, *limits, fault=("poisoned", {"number": 10}))
    assert ranks.wait(all_by_themselves=True) == [EXIT_FAULT] * 2, ranks.output()
    assert "held-out losses at step 10 are not finite: text nan" in ranks.output()
    assert "started again, the run goes on from" in ranks.output()
    assert saved_steps(run) == [5]


def test_a_stop_while_steps_are_skipped_saves_nothing(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = ("stopped_in_a_bad_stretch", {"first": 7, "last": 11})
    ranks = start(run, fault=fault)
    assert ranks.wait(all_by_themselves=True) == [EXIT_RESTART] * 2, ranks.output()
    assert saved_steps(run) == [5]
    told = "the last 5 step(s) were skipped, so that nothing was saved: the same command goes on from"
    assert f"{told} {run / 'checkpoints' / 'step_00000005'}" in ranks.output()


def test_samples_that_were_due_at_a_stop_are_made_at_the_next_start(
    start: Start, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    evaluation = f"data.evaluation={{text: {{path: {tiny_data}/text, readers: {{text: text}}}}}}"
    settings = ("training.steps=6", "monitor.sample_every_steps=5", evaluation)
    ranks = start(run, *settings, fault=("stopped", {"step": 5}))
    assert ranks.wait(all_by_themselves=True) == [EXIT_RESTART] * 2, ranks.output()
    assert state_of_newest(run)["step"] == 5
    assert "time/apart/sample" not in str(read_metrics(run))
    assert start(run, *settings).wait() == [0, 0]
    assert list(figures(run, "time/apart/sample")) == [5, 6]


def test_a_stop_right_after_going_back_keeps_the_place_in_the_data(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    limits = ("guards.max_skipped_steps=2", "training.steps=12")
    fault = ("stopped_in_a_bad_stretch", {"first": 7, "last": 9})
    ranks = start(run, *limits, fault=fault)
    assert ranks.wait(all_by_themselves=True) == [EXIT_RESTART] * 2, ranks.output()
    assert "back to step 5" in ranks.output()
    assert start(run, *limits).wait() == [0, 0]
    undisturbed = tmp_path / "undisturbed"
    assert start(undisturbed, *limits).wait() == [0, 0]
    seen, usual = (figures(folder, "data/fingerprint") for folder in (run, undisturbed))
    assert [seen[step] for step in (6, 7, 8)] == [usual[step] for step in (10, 11, 12)]
    assert figures(run, "guards/skipped_not_finite")[12] == 3


@pytest.mark.parametrize(
    ("first", "message"), [(2, "there is no checkpoint to go back to"), (7, "after 1 rewind(s)")]
)
def test_a_run_that_cannot_recover_gives_up(start: Start, tmp_path: Path, first: int, message: str) -> None:
    limits = ("guards.max_skipped_steps=1", "guards.max_rewinds=1")
    fault = ("not_a_number", {"victim": 0, "first": first, "last": 10_000})
    ranks = start(tmp_path / "run", *limits, fault=fault)
    assert ranks.wait(all_by_themselves=True) == [EXIT_FAULT] * 2, ranks.output()
    assert message in ranks.output()


def test_a_spike_is_skipped(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = ("spike", {"victim": 1, "number": 14, "factor": 50.0})
    ranks = start(run, "training.steps=16", "guards.spike_window=8", fault=fault)
    assert ranks.wait() == [0, 0], ranks.output()
    skipped = figures(run, "guards/skipped_spikes")
    assert [step for step in skipped if skipped[step] > skipped.get(step - 1, 0)] == [14]
    assert state_of_newest(run)["optimizer_steps"]["decoder"] == 15.0
    assert figures(run, "loss/all")[14] > 2 * figures(run, "loss/all")[15]
    assert "step 14 is skipped: its loss is " in ranks.output()
    assert "OVERFLOW" not in ranks.output()


def test_a_rank_asleep_ends_the_run_with_the_stacks_of_all(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start(run, "guards.hang_minutes=0.25", fault=("asleep", {"victim": 1, "number": 7}))
    assert ranks.wait(all_by_themselves=True) == [EXIT_FAULT] * 2, ranks.output()
    sleeping, waiting = ((run / "logs" / f"stacks_rank_0000{rank}.txt").read_text() for rank in (1, 0))
    assert "hung" in sleeping and "while step 7" in sleeping
    assert f"state       failed 0 s ago: {waiting.splitlines()[0]} (exit code 70)" in describe_run(run, 0.0)
    assert "in sleep" in sleeping and "injected.py" in sleeping
    assert "all_reduce" in waiting or "step.py" in waiting
    again = start(run)
    assert again.wait() == [0, 0], again.output()
    assert "step 5 of 40, resumed" in again.output()


def test_a_late_rank_is_named(start: Start, tmp_path: Path) -> None:
    ranks = start(tmp_path / "run", "training.steps=8", fault=("late", {"victim": 1, "seconds": 0.4}))
    assert ranks.wait() == [0, 0], ranks.output()
    assert f"rank 1 on {os.uname().nodename} is slow: it comes to a step late by" in ranks.output()
    assert figures(tmp_path / "run", "ranks/late_seconds_worst")[8] > 0.3


def test_a_corrupted_replica_is_named_and_not_saved(start: Start, tmp_path: Path) -> None:
    parameter = "gpt.embedding.word_embeddings.weight"
    sizes = ("data.lanes=6", "training.global_batch_size=6", "guards.drift_every_steps=3")
    fault = ("corrupt_weight", {"victim": 2, "number": 6, "parameter": parameter})
    ranks = start(tmp_path / "run", *sizes, num_ranks=3, fault=fault)
    assert ranks.wait(all_by_themselves=True) == [EXIT_FAULT] * 3, ranks.output()
    assert "1 parameter(s) differ between replicas at step 6" in ranks.output()
    assert f"decoder.{parameter} on rank 2 of ranks [0, 1, 2]" in ranks.output()
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [folder.name for folder in checkpoints] == ["step_00000005"]


def test_masters_of_tensor_ranks_that_drift_apart_are_found_later(start: Start, tmp_path: Path) -> None:
    """Each tensor rank updates its own master of a parameter that is not cut; nothing heals it."""
    parameter = "gpt.decoder.layers.0.mlp_norm.weight"
    fault = ("corrupt_master", {"victim": 1, "number": 4, "parameter": parameter})
    ranks = start(tmp_path / "run", "parallel.tensor=2", "guards.drift_every_steps=3", fault=fault)
    assert ranks.wait(all_by_themselves=True) == [EXIT_FAULT] * 2, ranks.output()
    assert f"decoder.{parameter} on rank 1 of ranks [0, 1]" in ranks.output()
    assert "at step 6" in ranks.output()


def test_a_time_limit_saves_and_asks_to_be_started_again(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start(run, "training.time_limit_minutes=0.25", fault=("slow_steps", {"seconds": 1.0}))
    assert ranks.wait(all_by_themselves=True) == [EXIT_RESTART] * 2, ranks.output()
    last = max(figures(run, "loss/all"))
    assert 0 < last < 40
    limit = (
        f"stopped as asked after step {last}, by training.time_limit_minutes = 0.25; the same command goes on"
    )
    assert limit in ranks.output()
    assert f"at step {last} by training.time_limit_minutes = 0.25; started again," in describe_run(run, 0.0)
    assert state_of_newest(run)["step"] == last


@pytest.fixture
def colours(tmp_path: Path) -> str:
    """A task of questions about images, as `monitor.tasks`."""
    data = tmp_path / "data" / "colours"
    data.mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(data / "black.png")
    questions = [{"question": f"number {number}?", "answer": "black"} for number in range(4)]
    (data / "validation.jsonl").write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "colours",
        "cluster": "pictures",
        "data": {
            "folder": "colours",
            "reader": "jsonl",
            "files": {"validation": "validation.jsonl"},
            "fields": {"question": "question", "right": "answer"},
            "media": {"picture": "black.png"},
        },
        "answer": "right",
        "templates": [{"id": "asked", "span": [{"image": "picture"}, "{question}"]}],
        "decode": {"max_new_tokens": 2},
        "metrics": ["exact_match"],
    }
    path = tmp_path / "colours.yaml"
    path.write_text(json.dumps(task))
    return f"monitor.tasks={{names: [{path}], data: {data.parent}, every_steps: 3}}"


@pytest.mark.parametrize(
    ("part", "message"),
    [("jsonl", "Stale file handle"), ("png", "process 1 reads other data of the tasks than the first one")],
)
def test_tasks_that_one_rank_cannot_read_are_told_and_the_training_goes_on(
    start: Start, tmp_path: Path, colours: str, part: str, message: str
) -> None:
    run = tmp_path / "run"
    fault = ("tasks_unreadable", {"victim": 1, "part": part})
    ranks = start(run, "training.steps=4", "parallel.tensor=2", colours, fault=fault)
    assert ranks.wait() == [0, 0], ranks.output()
    for step in (3, 4):
        assert f"tasks are not scored at step {step}: " in ranks.output()
    assert message in ranks.output()
    assert state_of_newest(run)["step"] == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, but_for: int = 0) -> Path:
    """A file that takes all that is left of a disk, whatever others write meanwhile, but for some bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        file.truncate(max(0, file.tell() - but_for))
    return filler


def test_a_full_disk_is_told_and_the_training_goes_on(start: Start, small_disk: Path) -> None:
    run = small_disk / "run"
    ranks = start(run, "checkpoint.keep_last=2", fault=("slow_steps", {"seconds": 0.2}))
    assert wait_until(lambda: len(list_checkpoints(run / "checkpoints")) == 1, ranks)
    filler = fill(small_disk)
    assert wait_until(lambda: "could not be saved" in ranks.output(), ranks)
    filler.unlink()
    assert ranks.wait() == [0, 0], ranks.output()
    assert "No space left on device" in ranks.output()
    assert "figures cannot be written" in ranks.output()
    assert 40 in figures(run, "loss/all")
    assert figures(run, "guards/failed_saves")[40] >= 1
    assert state_of_newest(run)["step"] == 40
    assert all(map(is_whole, list_checkpoints(run / "checkpoints")))


def test_a_last_save_that_fails_ends_with_a_fault(start: Start, small_disk: Path) -> None:
    run = small_disk / "run"
    ranks = start(
        run, "training.steps=10", "checkpoint.every_steps=10", fault=("slow_steps", {"seconds": 0.2})
    )
    assert wait_until(lambda: (run / "logs" / "metrics.jsonl").exists(), ranks)
    fill(small_disk, but_for=64 * 1024)
    assert ranks.wait(all_by_themselves=True) == [EXIT_FAULT] * 2, ranks.output()
    assert "could not be saved" in ranks.output()
    assert list((run / "checkpoints").iterdir()) == []
