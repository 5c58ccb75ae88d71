"""`pretrain.sbatch` with real training: two nodes of two ranks give the losses of one process."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from built_once import built_once
from distributed.ranks import run_program
from metalm.operations.history import read_attempts
from metalm.operations.status import describe_run
from metalm.run_metrics import read_metrics
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
def alone(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, without tensor parallelism."""

    def train(run: Path) -> None:
        words = ["-m", "metalm", "train", str(pipeline), "parallel.tensor=1"]
        code, output = run_program(
            [*words, f"run.folder={run.parent}", f"run.name={run.name}"], timeout_s=120
        )
        assert code == 0, output

    return built_once(tmp_path_factory, "alone", train)


@pytest.fixture(scope="module")
def reference(alone: Path) -> dict[int, float]:
    """Its losses."""
    return losses(alone)


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss/all"] for entry in read_metrics(run) if "loss/all" in entry}


def settings(launcher: str, preflight: str = "no") -> dict[str, str]:
    return {
        "METALM_PYTHON": sys.executable,
        "METALM_LAUNCHER": launcher,
        "METALM_PREFLIGHT": preflight,
        "OMP_NUM_THREADS": "1",
    }


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
    preflight = "--gpus 0 --mebibytes 4 --write-mib-s 0"  # Slurm gives GPUs here that are none
    job = cluster.submit(*words, environment=settings("torchrun", preflight))
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
    table = [line.split()[1:] for line in log.read_text().splitlines() if re.match(r"0: +node[12] ", line)]
    assert [(row[0], row[-1]) for row in table] == [("node1", "ok"), ("node2", "ok")] * 2
    assert all(float(row[-3]) > 0 and float(row[-2]) > 0 for row in table)  # within and across nodes


def test_a_bad_config_starts_nothing(cluster: VirtualCluster, pipeline: Path, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    words = (*OPTIONS, f"--output={log}", "slurm/pretrain.sbatch", str(pipeline), "training.step=3")
    job = cluster.submit(*words, environment=settings("torchrun"))
    facts = cluster.wait_for(job, ENDED, timeout_s=120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "64:0", "0")
    assert "training.step: unknown key; did you mean 'steps'?" in log.read_text()


def test_a_second_job_of_a_run_is_refused_by_the_name_of_the_first(
    cluster: VirtualCluster, pipeline: Path, tmp_path: Path
) -> None:
    run, log = pipeline.parent / "runs/taken", tmp_path / "job.log"
    hold = (
        "import sys, time; from pathlib import Path; from metalm.run_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); lock.accept(); time.sleep(600)"
    )
    first = cluster.submit(
        "--nodes=1", "--output=/dev/null", "--wrap", shlex.join([sys.executable, "-c", hold, str(run)])
    )
    wait_until((run / "lock").exists, "the first holds the run", timeout_s=60)
    words = ("--nodes=1", "--ntasks=1", f"--output={log}", "slurm/pretrain.sbatch", str(pipeline))
    second = cluster.submit(*words, "parallel.tensor=1", "run.name=taken", environment=settings("srun"))
    facts = cluster.wait_for(second, ENDED, timeout_s=120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "64:0", "0"), (
        log.read_text()
    )
    node = cluster.facts(first)["NodeList"]
    assert re.search(rf"taken is held by process \d+ on {node}, Slurm job {first}, since", log.read_text())
    assert cluster.facts(first)["JobState"] == "RUNNING"
    assert [path.name for path in run.iterdir()] == ["lock"]


@pytest.mark.parametrize("what", ["power", "network"])
def test_a_node_lost_in_mid_step_is_left_behind_and_nothing_is_lost(
    cluster: VirtualCluster, pipeline: Path, reference: dict[int, float], tmp_path: Path, what: str
) -> None:
    name = f"lost_{what}"
    log, run = tmp_path / "job.log", pipeline.parent / "runs" / name
    words = ("--nodes=2", "--time=60", f"--output={log}", "slurm/pretrain.sbatch", str(pipeline))
    environment = settings("srun") | {"METALM_RANKS_PER_NODE": "1"}
    job = cluster.submit(*words, f"run.name={name}", environment=environment)
    wait_until(
        lambda: run.exists() and max(losses(run), default=0) > 8, "steps after a checkpoint", timeout_s=120
    )
    cut, mend = {
        "power": (cluster.cut_power, cluster.boot),
        "network": (cluster.cut_network, cluster.mend_network),
    }[what]
    cut("node2")
    try:
        facts = cluster.wait_for(job, ENDED, timeout_s=240)
    finally:
        mend("node2")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    first, last = read_attempts(run)
    assert first.cause == "queued again by Slurm: lost node2"
    assert (last.first_step, last.nodes) == (8, "node[1,3]")
    found = losses(run)
    assert len(found) == STEPS
    assert found == pytest.approx(reference, abs=1e-5)


def test_a_job_that_is_queued_again_runs_what_was_submitted(
    cluster: VirtualCluster,
    pipeline: Path,
    reference: dict[int, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = tmp_path / "repository"
    for name in ("src", "slurm", "tools", "deepspeed_configs", "pipelines"):
        shutil.copytree(REPOSITORY / name, repository / name, ignore=shutil.ignore_patterns("*.egg-info"))
    monkeypatch.chdir(repository)
    run = pipeline.parent / "Läufe von heute/submitted"
    words = (
        str(pipeline),
        f"run.folder={run.parent}",
        "run.name=submitted",
        "--nodes",
        "2",
        "--ranks-per-node",
        "1",
        "--sbatch=--time=60",
        "--sbatch=--export=NONE",
    )
    environment = settings("srun") | {"PYTHONPATH": str(repository / "src")}
    said = cluster.command(sys.executable, "tools/submit.py", *words, environment=environment)
    (job,) = re.findall(r"Submitted batch job (\d+)", said)
    wait_until(lambda: run.exists() and losses(run), "the first step", timeout_s=120)
    for changed in (repository / "src/metalm/cli.py", repository / "slurm/launch.sh"):
        changed.write_text("exit(3)\n")
    (repository / "deepspeed_configs/decoder_zero1.json").unlink()
    cluster.command("scontrol", "requeue", job)
    facts = cluster.wait_for(job, ENDED, timeout_s=240)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said
    assert losses(run) == pytest.approx(reference, abs=1e-5)
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["provenance"]["commit"] == "unknown"
    )  # no git there
    assert "submitted" in facts["JobName"]


def test_status_tells_what_slurm_says_of_a_run_that_waits(cluster: VirtualCluster, pipeline: Path) -> None:
    run = pipeline.parent / "Läufe von heute/held"
    words = (str(pipeline), f"run.folder={run.parent}", "run.name=held", "--nodes=2", "--ranks-per-node=1")
    said = cluster.command(sys.executable, "tools/submit.py", *words, "--sbatch=--hold")
    (job,) = re.findall(r"Submitted batch job (\d+)", said)

    def state() -> str:
        return cluster.command(sys.executable, "-m", "metalm", "status", str(run))

    assert re.search(rf"waiting for its first start .*; job {job} is pending: JobHeldUser", state())
    cluster.command("scancel", job)
    assert re.search(r"gone: it was waiting for its first start .*; nothing is saved", state())


def test_finetuning_starts_from_another_run(
    cluster: VirtualCluster, pipeline: Path, alone: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    words = (str(pipeline), "run.name=tuned", "parallel.tensor=1", "training.steps=3")
    weights = (f"initialize.decoder={alone}", f"initialize.encoders={alone}")
    jobs = [
        cluster.submit(
            "--nodes=1",
            f"--output={tmp_path}/job-%j.log",
            "slurm/finetune.sbatch",
            *words,
            *more,
            environment=settings("srun") | {"METALM_RANKS_PER_NODE": "1"},
        )
        for more in ((), weights)
    ]
    refused, tuned = (cluster.wait_for(job, ENDED, timeout_s=120) for job in jobs)
    assert refused["ExitCode"] == "64:0"
    assert "nothing to start from" in (tmp_path / f"job-{jobs[0]}.log").read_text()
    assert tuned["JobState"] == "COMPLETED", (tmp_path / f"job-{jobs[1]}.log").read_text()
    assert losses(pipeline.parent / "runs/tuned")[1] < reference[1] - 0.1  # it goes on from what was learnt
