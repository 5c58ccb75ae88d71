"""`pretrain.sbatch` with real training: two nodes of two ranks give the losses of one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.ranks import run_command
from metalm.operations.history import read_attempts
from metalm.operations.status import describe_run
from metalm.training.metrics import read_metrics
from slurm.virtual_cluster import VirtualCluster, wait_until

REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
STEPS = 16
OPTIONS = ("--nodes=2", "--gpus-per-node=2", "--time=60")  # two ranks on each of two nodes


@pytest.fixture(autouse=True)
def _in_repository(cluster: VirtualCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(REPOSITORY)
    yield
    cluster.clear()


@pytest.fixture(scope="module")
def reference(pipeline: Path) -> dict[int, float]:
    """The losses of a process alone, without tensor parallelism."""
    command = [sys.executable, "-m", "metalm", "train", str(pipeline), "run.name=alone", "parallel.tensor=1"]
    code, output = run_command(command, timeout_s=120)
    assert code == 0, output
    return losses(pipeline.parent / "runs/alone")


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss/all"] for entry in read_metrics(run) if "loss/all" in entry}


def settings(launcher: str) -> dict[str, str]:
    return {"METALM_PYTHON": sys.executable, "METALM_LAUNCHER": launcher, "OMP_NUM_THREADS": "1"}


def test_a_task_per_rank_gives_the_losses_of_one_process(
    cluster: VirtualCluster, pipeline: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    words = (*OPTIONS, f"--output={log}", "slurm/pretrain.sbatch", str(pipeline), "run.name=srun")
    job = cluster.submit(*words, environment=settings("srun"))
    facts = cluster.wait_for(job, ENDED, timeout_s=150)
    assert facts["JobState"] == "COMPLETED", log.read_text()
    run = pipeline.parent / "runs/srun"
    assert "rank 3 of 4, started by slurm" in (run / "logs/rank_00003.log").read_text()
    found = losses(run)
    assert len(found) == STEPS
    assert found == pytest.approx(reference, abs=1e-5)


def test_a_run_that_is_stopped_in_time_and_queued_again_loses_nothing(
    cluster: VirtualCluster, pipeline: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    log, run = tmp_path / "job.log", pipeline.parent / "runs/torchrun"
    words = (*OPTIONS, f"--output={log}", "slurm/pretrain.sbatch", str(pipeline), "run.name=torchrun")
    job = cluster.submit(*words, environment=settings("torchrun"))
    wait_until(lambda: run.exists() and losses(run), "the first step", timeout_s=120)
    cluster.command("scancel", "--batch", "--signal=USR2", job)  # what `--signal=B:USR2@600` does
    facts = cluster.wait_for(job, ENDED, timeout_s=240)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    first, last = read_attempts(run)
    assert (first.cause, first.code, last.cause) == ("time limit", 75, "done")
    assert 0 < last.first_step < STEPS
    assert "rank 3 of 4, started by torchrun" in (run / "logs/rank_00003.log").read_text()
    found = losses(run)
    assert len(found) == STEPS
    assert found == pytest.approx(reference, abs=1e-5)
    assert "\nstate       done\n" in describe_run(run, last.ended or 0.0)


def test_a_bad_config_starts_nothing(cluster: VirtualCluster, pipeline: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    words = (*OPTIONS, f"--output={log}", "slurm/pretrain.sbatch", str(pipeline), "training.step=3")
    job = cluster.submit(*words, environment=settings("torchrun"))
    facts = cluster.wait_for(job, ENDED, timeout_s=60)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "64:0", "0")
    assert "training.step: unknown key; did you mean 'steps'?" in log.read_text()
