"""When `pretrain.sbatch` brings a run back and when not, with a stand-in for training on two nodes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metalm.operations.status import describe_run
from metalm.operations.stop import stop
from slurm.virtual_cluster import VirtualCluster, wait_until

REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

Submit = Callable[..., str]


@pytest.fixture
def submit(cluster: VirtualCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submit]:
    """Submit the template as an operator does, with options of sbatch, overrides and settings."""
    monkeypatch.chdir(REPOSITORY)

    def submitted(*overrides: str, options: tuple[str, ...] = (), **settings: str) -> str:
        environment = {
            "METALM_PYTHON": str(REPOSITORY / "tests/slurm/trainer.sh"),
            "METALM_LAUNCHER": "srun",
            **settings,
        }
        words = ("--nodes=2", "--time=60", f"--output={tmp_path}/job.log", *options)
        arguments = ("any.yaml", f"run.folder={tmp_path}", *overrides)
        return cluster.submit(*words, "slurm/pretrain.sbatch", *arguments, environment=environment)

    yield submitted
    cluster.clear()


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run/logs/attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def causes(folder: Path) -> list[str]:
    return [event["cause"] for event in events(folder) if event["event"] == "end"]


def state(run: Path) -> str:
    """As `metalm status` tells it."""
    (line,) = (line for line in describe_run(run, time.time()).splitlines() if line.startswith("state"))
    return line.removeprefix("state").strip()


def wait_for_step(folder: Path, step: int) -> None:
    latest = folder / "run/checkpoints/latest"
    wait_until(
        lambda: latest.exists() and int(latest.read_text().strip().removeprefix("step_") or 0) >= step,
        f"the run has saved step {step}",
        timeout_s=40,
    )


def test_a_run_that_is_done_ends(cluster: VirtualCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit("steps=3", options=("--gpus-per-node=2",))
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    log = (tmp_path / "job.log").read_text()
    assert facts["JobState"] == "COMPLETED", log
    assert causes(tmp_path) == ["done"]
    assert sorted({line[:7] for line in log.splitlines() if "goes on from" in line}) == [
        f"{rank}: rank"
        for rank in range(4)  # two GPUs per node: two ranks per node
    ]
    assert not list((tmp_path / "run/logs/exit_codes").iterdir())


@pytest.mark.parametrize("code", [64, 65])
def test_what_starting_again_cannot_mend_is_not_queued_again(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path, code: int
) -> None:
    job = submit(f"fails={code}@0")
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert causes(tmp_path) == [f"ranks ended with {code}"]


def test_no_name_is_evaluated_and_no_file_but_manifests_believed(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    folder = tmp_path / "Läufe von heute, $(touch executed) it's"
    checkpoint = folder / "run/checkpoints/step_00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    executed = tmp_path / "executed"
    (checkpoint.parent / "latest").write_text(f"step_0+a[$(touch {executed})0]\n")
    job = submit(f"run.folder={folder}", "steps=7")
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert facts["JobState"] == "COMPLETED", (tmp_path / "job.log").read_text()
    assert [(event["event"], event["step"]) for event in events(folder)] == [("start", 5), ("end", 7)]
    assert not executed.exists() and not (REPOSITORY / "executed").exists()


def test_a_fault_comes_back_and_ends(cluster: VirtualCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit("fails=70@5", "steps=8")
    facts = cluster.wait_for(job, ENDED, timeout_s=150)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    first, last = causes(tmp_path)
    assert first.startswith("rank_0000") and first.endswith("ended with 70")
    assert last == "done"
    assert [event["step"] for event in events(tmp_path)] == [0, 5, 5, 8]


def test_the_watchdogs_word_is_the_cause(cluster: VirtualCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit("fails=70@5", "steps=8", BARK="rank 0 has hung for 600 s while saving")
    facts = cluster.wait_for(job, ENDED, timeout_s=150)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert causes(tmp_path) == ["rank 0 has hung for 600 s while saving", "done"]


def test_a_kill_for_want_of_memory_comes_back(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    job = submit("eats=5", "steps=8", options=("--mem=100M",))
    facts = cluster.wait_for(job, ENDED, timeout_s=150)
    log = (tmp_path / "job.log").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    first, last = causes(tmp_path)
    assert "exceed" in log and "memory" in log.lower()
    assert (first, last) == ("4 of 4 ranks vanished, srun ended with 137 (out of memory?)", "done")
    assert [event["step"] for event in events(tmp_path)] == [0, 5, 5, 8]


def test_a_run_that_always_fails_gives_up(cluster: VirtualCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit("fails=137@2", METALM_MAX_STARTS="2")
    facts = cluster.wait_for(job, ENDED, timeout_s=150)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1")
    first, last = causes(tmp_path)
    assert first.endswith("was killed by signal 9 (out of memory?)")
    assert last.endswith("2 starts without a new checkpoint")


def test_the_time_limits_signal_saves_and_comes_back(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    submit(options=("--time=2", "--signal=B:USR2@90"))  # Slurm looks at limits twice a minute
    wait_until(lambda: len(events(tmp_path)) >= 3, "the second start", timeout_s=150)
    ended, again = events(tmp_path)[1:3]
    assert (ended["cause"], ended["code"], again["restart"]) == ("time limit", 75, 1)
    assert again["step"] == ended["step"] > 0
    wait_for_step(tmp_path, again["step"] + 1)
    assert f"goes on from step {ended['step']}" in (tmp_path / "job.log").read_text()


def test_scancel_saves_and_ends(cluster: VirtualCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit()
    wait_for_step(tmp_path, 5)
    cluster.command("scancel", job)
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    wait_until(lambda: causes(tmp_path) == ["cancelled"], "the end is on record", timeout_s=120)
    saved = events(tmp_path)[-1]["step"]
    assert state(tmp_path / "run").endswith(
        f"job {job}: cancelled (exit code 75); started again, it goes on from step {saved}"
    )


def test_an_operators_stop_ends(cluster: VirtualCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit()
    wait_for_step(tmp_path, 5)
    stop(tmp_path / "run")
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "0")
    (cause,) = causes(tmp_path)
    assert cause.startswith("asked to stop: root 20")
    saved = events(tmp_path)[-1]["step"]
    assert state(tmp_path / "run").startswith("ended ")
    assert f": {cause} (exit code 75); started again, it goes on from step {saved}" in state(tmp_path / "run")


def test_a_run_that_stops_by_itself_comes_back(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    job = submit("fails=75@5", "steps=8")  # as at training.time_limit_minutes
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert causes(tmp_path) == ["stopped by itself or by a signal", "done"]


def test_an_operators_stop_holds_for_a_job_that_waits(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    (tmp_path / "run/logs").mkdir(parents=True)
    job = submit(options=("--hold",))
    stop(tmp_path / "run")
    cluster.command("scontrol", "release", job)
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert facts["ExitCode"] == "75:0"
    (cause,) = causes(tmp_path)
    assert cause.startswith("asked to stop before it started: root 20")
    assert [event["event"] for event in events(tmp_path)] == ["end"]
    assert state(tmp_path / "run").endswith(f"{cause} (exit code 75); nothing is saved")
    assert not (tmp_path / "run/stop").exists()


def test_a_preempted_run_saves_and_comes_back(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    submit(options=("--partition=low",))
    wait_for_step(tmp_path, 5)
    urgent = cluster.submit("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    wait_until(lambda: len(events(tmp_path)) >= 3, "the second start", timeout_s=120)
    cluster.wait_for(urgent, ["COMPLETED"], timeout_s=120)
    ended, again = events(tmp_path)[1:3]
    assert (ended["cause"], ended["code"], again["step"]) == ("preempted", 75, ended["step"])


def test_an_operators_requeue_comes_back_once(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    job = submit()
    wait_for_step(tmp_path, 5)
    cluster.command("scontrol", "requeue", job)
    wait_until(lambda: len(events(tmp_path)) >= 3, "the second start", timeout_s=120)
    ended, again = events(tmp_path)[1:3]
    assert (ended["cause"], ended["code"]) == ("queued again by Slurm", 75)
    assert (again["job"], again["restart"], again["step"]) == (job, 1, ended["step"])
    assert state(tmp_path / "run") == f"running (job {job} on node[1-2], 4 ranks)"


def test_ranks_on_a_node_that_drains_save(cluster: VirtualCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit("saves_s=3")
    wait_for_step(tmp_path, 5)
    cluster.command("scontrol", "update", "NodeName=node2", "State=DRAIN", "Reason=repair")
    try:
        cluster.command("scontrol", "requeue", job)
        wait_until(lambda: len(events(tmp_path)) >= 3, "the second start", timeout_s=120)
    finally:
        cluster.command("scontrol", "update", "NodeName=node2", "State=RESUME")
    ended, again = events(tmp_path)[1:3]
    assert (ended["cause"], ended["code"]) == ("queued again by Slurm", 75)
    assert (again["nodes"], again["step"]) == ("node[1,3]", ended["step"])


def test_a_successor_where_requeueing_is_not_allowed(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    job = submit("fails=70@5", "steps=8", options=("--no-requeue",), METALM_COME_BACK="submit")
    assert cluster.wait_for(job, ENDED, timeout_s=120)["JobState"] == "FAILED"
    wait_until(lambda: causes(tmp_path)[1:] == ["done"], "the successor is done", timeout_s=120)
    first, _, second, _ = events(tmp_path)
    assert second["job"] != job
    assert second["chain"] == first["chain"] == job


def test_a_run_that_hangs_is_ended_and_comes_back(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    submit("hangs=5", METALM_HANG_MINUTES="0.2")
    wait_until(lambda: len(events(tmp_path)) >= 3, "the second start", timeout_s=150)
    ended, again = events(tmp_path)[1:3]
    assert (ended["cause"], again["restart"], again["step"]) == ("no step for 0.2 minutes", 1, 5)


def test_jobs_of_one_name_run_one_after_another(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    chain = ("--job-name=chain", "--dependency=singleton", "--nodes=1")
    first = submit("steps=20", options=chain)
    second = submit("steps=30", options=chain)
    assert cluster.facts(second)["JobState"] == "PENDING"
    cluster.wait_for(second, ["COMPLETED"], timeout_s=120)
    assert [(event["job"], event["step"]) for event in events(tmp_path)] == [
        *((first, 0), (first, 20)),
        *((second, 20), (second, 30)),
    ]


def test_a_node_that_fails_its_preflight_is_left_out(
    cluster: VirtualCluster, submit: Submit, tmp_path: Path
) -> None:
    slow = tmp_path / "bin/scontrol"  # so slow that Slurm's SIGTERM comes before its update is done
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n[ "$1" != update ] || sleep 3\nexec {shutil.which("scontrol")} "$@"\n')
    slow.chmod(0o755)
    package = tmp_path / "other/torch-9.9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    job = submit(
        "steps=5",
        PATH=f"{slow.parent}:{os.environ['PATH']}",
        REAL_PYTHON=sys.executable,
        ODD_NODE="node2",
        ODD_PATH=str(package.parent),
        METALM_PREFLIGHT="--gpus 0 --mebibytes 4 --write-mib-s 0",
    )
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    log = (tmp_path / "job.log").read_text()
    assert (facts["JobState"], facts["Restarts"], facts["ExcNodeList"]) == ("COMPLETED", "1", "node2"), log
    first, last = causes(tmp_path)
    assert first.startswith("failed the preflight: node2: torch is 9.9.9, elsewhere 2.")
    assert last == "done"
    assert [event["nodes"] for event in events(tmp_path) if event["event"] == "start"] == [
        "node[1-2]",
        "node[1,3]",
    ]
    assert "queued again without node2" in log
    assert "failed the preflight: node2" in describe_run(tmp_path / "run", 0.0)


def test_a_job_without_a_fit_node_ends(cluster: VirtualCluster, submit: Submit, tmp_path: Path) -> None:
    job = submit(
        options=("--nodes=1",),
        METALM_PREFLIGHT="--write-mib-s 0",
        REAL_PYTHON=sys.executable,
    )
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "69:0", "0")
    assert causes(tmp_path) == ["failed the preflight: node1: 0 GPUs, expected 2 (no node is left)"]
