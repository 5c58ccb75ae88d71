"""What `metalm status` tells of run folders in every state."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metalm.checkpoint.best import Best, write_best
from metalm.errors import ConfigError
from metalm.operations.history import read_attempts
from metalm.operations.status import describe, describe_run
from metalm.run_metrics import newest_metrics
from permissions import as_users_are

NOW = 1_800_000_000.0


def metrics(step: int, at: float, **more: float) -> str:
    figures = {
        "loss/all": 2.5,
        "loss/text": 2.0,
        "loss/scenes": 3.0,
        "optimizer/skipped_steps": 1,
        "speed/tokens_per_second": 12345.6,
        "speed/step_seconds": 0.5,
        "speed/data_wait_share": 0.02,
        "data/scenes/skipped/undecodable": 3,
        "data/text/skipped/too_long": 0,
    }
    return json.dumps({"step": step, "time": at, **figures, **more}) + "\n"


def start(at: float, job: str = "7", step: int = 0) -> str:
    entry = {"event": "start", "time": at, "job": job, "restart": 0, "nodes": "gpu[1-2]", "ranks": 16}
    return json.dumps(entry | {"chain": job, "step": step}) + "\n"


def end(at: float, code: int, cause: str, comes_back: bool, job: str = "7") -> str:
    entry = {"event": "end", "time": at, "job": job, "restart": 0, "code": code, "cause": cause}
    return json.dumps(entry | {"comes_back": comes_back, "step": 0}) + "\n"


@pytest.fixture(autouse=True)
def squeue(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that finds no Slurm, wherever the tests run."""
    path = tmp_path_factory.mktemp("bin") / "squeue"
    path.write_text("#!/bin/bash\nexit 1\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 1,000 steps that logged steps 10 to 100, one step a second, and saved step 80."""
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("training: {steps: 1000}\n")
    lines = [metrics(step, NOW - 110 + step) for step in range(10, 101, 10)]
    (folder / "logs/metrics.jsonl").write_text("".join(lines))
    checkpoint = folder / "checkpoints/step_00000080"
    checkpoint.mkdir(parents=True)
    os.utime(checkpoint, (NOW - 30, NOW - 30))
    os.utime(checkpoint.parent, (NOW - 30, NOW - 30))
    return folder


def described(folder: Path, now: float = NOW) -> dict[str, str]:
    """The lines by their names; the lines that follow one without a name belong to it."""
    found: dict[str, str] = {}
    name = ""
    for line in describe_run(folder, now).splitlines():
        name = line[:12].strip() or name
        found[name] = f"{found[name]}\n{line[12:]}" if name in found else line[12:]
    return found


def test_a_running_run(run: Path) -> None:
    found = described(run)
    assert found["state"] == "running"
    assert found["step"] == "100 of 1,000 (10.0%)"
    assert found["loss"] == "2.5000 (text 2.0000  scenes 3.0000)"
    assert found["speed"] == "12,346 tokens/s, 0.50 s per step, data wait 2%"
    assert found["time left"] == "15 min 00 s"  # 900 steps at the second per step that the clock shows
    assert found["checkpoint"] == "step 80, 30 s old"
    assert "best" not in found
    assert found["skipped"] == "3 samples, scenes undecodable 3; 1 steps"


def test_the_best_checkpoint_is_named_with_its_figure(run: Path) -> None:
    write_best(run / "checkpoints", Best("step_00000060", "held_out/text", 2.125))
    assert described(run)["best"] == "step 60, held_out/text 2.1250"


def test_a_run_without_a_sign_of_life(run: Path) -> None:
    found = described(run, NOW + 3600)
    assert found["state"].startswith("silent for 1 h 00 min")
    assert "time left" not in found


def test_a_run_that_was_asked_to_stop(run: Path) -> None:
    (run / "stop").touch()
    assert described(run)["state"] == "running, asked to stop"


def test_restarts_and_their_causes(run: Path) -> None:
    history = start(NOW - 900) + end(NOW - 600, 75, "time limit", True)
    history += start(NOW - 500, step=40) + start(NOW - 105, step=80)
    (run / "logs/attempts.jsonl").write_text(history)
    found = described(run)
    assert found["state"] == "running (job 7 on gpu[1-2], 16 ranks)"
    count, first, second = found["restarts"].splitlines()
    assert count == "2"
    assert "from step 40  time limit" in first
    assert "from step 80  lost: its node failed" in second


def test_restarts_without_slurm_are_those_that_the_run_has_counted(run: Path) -> None:
    with (run / "logs/metrics.jsonl").open("a") as handle:
        handle.write(metrics(110, NOW, **{"run/restarts": 3, "guards/rewinds": 1}))
    found = described(run)
    assert found["restarts"] == "3"
    assert found["skipped"].endswith("1 steps; 1 times back to a checkpoint")


def test_a_node_that_failed_its_preflight_is_named(run: Path) -> None:
    history = start(NOW - 200) + end(NOW - 60, 69, "failed the preflight: gpu2: 7 GPUs, expected 8", True)
    (run / "logs/attempts.jsonl").write_text(history)
    assert described(run)["state"] == (
        "waiting to start again (ended 1 min 00 s ago, job 7: failed the preflight: gpu2: 7 GPUs, expected 8)"
    )


def test_the_pace_is_of_the_current_start(run: Path) -> None:
    """After an hour's pause, with Slurm's record of starts and without one."""
    resumed = NOW + 3600
    slow = [metrics(step, resumed + 2 * (step - 100), **{"run/restarts": 1}) for step in (110, 120)]
    with (run / "logs/metrics.jsonl").open("a") as handle:
        handle.writelines(slow)
    left = "29 min 20 s"  # 880 steps at two seconds
    assert described(run, resumed + 40)["time left"] == left
    (run / "logs/attempts.jsonl").write_text(start(NOW - 300) + start(resumed, step=80))
    assert described(run, resumed + 40)["time left"] == left


@pytest.mark.parametrize(
    ("code", "cause", "comes_back", "state"),
    [
        (75, "time limit", True, "waiting to start again (ended 1 min 00 s ago, job 7: time limit)"),
        (70, "rank_00003 on gpu2 ended with 70", False, "ended 1 min 00 s ago, job 7: rank_00003 on gpu2"),
    ],
)
def test_a_start_that_ended(run: Path, code: int, cause: str, comes_back: bool, state: str) -> None:
    (run / "logs/attempts.jsonl").write_text(start(NOW - 200) + end(NOW - 60, code, cause, comes_back))
    assert described(run)["state"].startswith(state)


def test_a_run_that_is_done(run: Path) -> None:
    (run / "checkpoints/step_00001000").mkdir()
    assert described(run)["state"] == "done"


def test_a_run_that_has_not_come_to_its_first_step(run: Path) -> None:
    (run / "logs/metrics.jsonl").unlink()
    (run / "checkpoints/step_00000080").rmdir()
    (run / "logs/attempts.jsonl").write_text(start(NOW - 20))
    found = described(run)
    assert found["state"] == "running (job 7 on gpu[1-2], 16 ranks)"
    assert found["checkpoint"] == "none"


def submit(folder: Path, at: float) -> None:
    config = folder / f"submitted/{at:.0f}/config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("training: {steps: 1000}\n")
    os.utime(config, (at, at))


def test_a_run_that_was_submitted_waits_for_its_first_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "submitted").mkdir()
    with pytest.raises(ConfigError, match="no run folder"):  # what sbatch has refused is taken away
        describe_run(folder, NOW)
    submit(folder, NOW - 90)
    waiting = "waiting for its first start (submitted 1 min 30 s ago)"
    assert described(folder)["state"] == waiting
    (row,) = describe(tmp_path, NOW).splitlines()[1:]
    assert re.fullmatch(rf"run +-/1,000 .*{re.escape(waiting)}", row)
    log = folder / "logs/job-7.log"
    log.touch()
    os.utime(log, (NOW - 30, NOW - 30))
    assert re.match(r"started, nothing on record yet .*: see .*/logs/job-7\.log", described(folder)["state"])
    (folder / "logs/attempts.jsonl").write_text(start(NOW - 20))
    assert described(folder)["state"] == "running (job 7 on gpu[1-2], 16 ranks)"


def test_a_run_that_has_failed_and_was_submitted_again_waits(run: Path) -> None:
    submit(run, NOW - 120)
    (run / "logs/job-7.log").touch()
    os.utime(run / "logs/job-7.log", (NOW - 100, NOW - 100))
    (run / "logs/attempts.jsonl").write_text(start(NOW - 110) + end(NOW - 5, 70, "no memory", False))
    assert described(run)["state"].startswith("ended 5 s ago, job 7: no memory")
    submit(run, NOW - 3)
    assert described(run)["state"] == "waiting for its next start (submitted 3 s ago)"


@pytest.fixture
def queue(squeue: Path) -> Path:
    """What squeue prints; beside it, how it was asked."""
    jobs = squeue.with_name("jobs")
    jobs.touch()
    squeue.write_text(f'#!/bin/bash\necho "$*" >>{squeue.parent}/asked\ncat {jobs}\n')
    return jobs


def test_slurm_is_asked_about_runs_that_wait(tmp_path: Path, queue: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("a", "b"):
        submit(runs / name, NOW - 90)
    waits = "its first start (submitted 1 min 30 s ago)"
    script = "submitted/20270115-080000/code/slurm/pretrain.sbatch"
    queue.write_text(
        f"12|PENDING|Priority|{runs.absolute()}/a/{script} one two\n"
        f"13|PENDING|Dependency|{runs.absolute()}/ab/{script}\n"
    )
    first, second = describe(runs, NOW).splitlines()[1:]
    assert first.endswith(f"waiting for {waits}; job 12 is pending: Priority")
    gone = f"gone: it was waiting for {waits}, and no job of `metalm submit` for it is in Slurm's queue"
    assert second.endswith(f"{gone}; nothing is saved")
    assert len((queue.parent / "asked").read_text().splitlines()) == 1


def test_a_job_that_is_queued_again_is_known_by_its_number(run: Path, queue: Path) -> None:
    (run / "logs/attempts.jsonl").write_text(start(NOW - 110) + end(NOW - 5, 75, "time limit", True))
    waits = "waiting to start again (ended 5 s ago, job 7: time limit)"
    queue.write_text(
        "6|RUNNING|None|other.sbatch\n"
        "7|PENDING|BeginTime|slurm/pretrain.sbatch x.yaml\n"
        f"a word|of|the site|{run.absolute()}/submitted/1/code/slurm/pretrain.sbatch x\n"
    )
    assert described(run)["state"] == f"{waits}; job 7 is pending: BeginTime"
    queue.write_text("")  # a successor of a job that `metalm submit` did not make may be there
    assert described(run)["state"] == waits


def test_a_run_is_the_same_behind_a_link(tmp_path: Path, queue: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "scratch")
    submit(tmp_path / "scratch/my run", NOW - 90)
    script = f"{tmp_path}/home/my run/submitted/1/code/slurm/finetune.sbatch {tmp_path}/x.yaml"
    queue.write_text(f"12|PENDING|JobHeldUser|{script}\n")
    for folder in ("scratch", "home"):
        assert described(tmp_path / folder / "my run")["state"].endswith("job 12 is pending: JobHeldUser")


def test_jobs_that_do_not_train_the_run_are_no_starts_of_it(run: Path, queue: Path) -> None:
    (run / "logs/attempts.jsonl").write_text(start(NOW - 110) + end(NOW - 50, 70, "no memory", False))
    submit(run, NOW - 3)
    template = run / f"submitted/{NOW - 3:.0f}/template"
    template.write_text("evaluate.sbatch\n")
    assert described(run)["state"].startswith("ended 50 s ago, job 7: no memory")
    template.write_text("pretrain.sbatch\n")
    queue.write_text(f"12|RUNNING|None|{run.absolute()}/submitted/1/code/slurm/evaluate.sbatch x\n")
    assert described(run)["state"].startswith("gone: it was waiting for its next start")


def test_jobs_that_may_be_hidden_are_not_gone(
    run: Path, queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(run, NOW + 1)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert described(run)["state"].startswith("waiting for its next start")


def test_no_run() -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        describe_run(Path("absent"), NOW)


def test_a_line_that_is_being_written_is_left_out(run: Path) -> None:
    with (run / "logs/metrics.jsonl").open("a") as handle:
        handle.write('{"step": 110, "ti')
    assert newest_metrics(run)[0]["step"] == 100
    (run / "logs/attempts.jsonl").write_text(start(NOW) + '{"event": "en')
    assert len(read_attempts(run)) == 1


def test_the_newest_lines_come_from_the_end_of_a_long_file(run: Path) -> None:
    path = run / "logs/metrics.jsonl"
    path.write_text("".join(metrics(step, NOW - 20_000 + step) for step in range(1, 20_001)))
    steps = [line["step"] for line in newest_metrics(run)]
    assert steps == list(range(20_000, 20_000 - len(steps), -1))
    assert 1000 < len(steps) < 10_000


def test_it_needs_neither_torch_nor_pydantic(run: Path) -> None:
    program = (
        "import sys; sys.argv = ['metalm', 'status', sys.argv[1]]\n"
        "from metalm.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'pydantic', 'numpy'} & sys.modules.keys()"
    )
    found = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "100 of 1,000" in found.stdout


def test_a_terminal_shows_the_state_in_colour_and_anew(run: Path) -> None:
    """Of one run and of all; what is not a terminal gets neither colours nor the clearing of the screen."""
    master, slave = os.openpty()
    command = [sys.executable, "-m", "metalm", "status", str(run), "--watch", "1"]
    process = subprocess.Popen(command, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    while shown.count(b"\033[H\033[2J") < 2:
        shown += os.read(master, 4096)
    process.terminate()
    process.wait(timeout=20)
    os.close(master)
    assert re.search(rb"state +\033\[3[123]m\w+\033\[0m", shown)
    plain = subprocess.run(command[:-2], capture_output=True, timeout=60)
    assert plain.returncode == 0 and b"\033" not in plain.stdout
    assert re.search(r"\n\S+ .*\033\[3[123]m\w+\033\[0m", describe(run.parent, NOW, coloured=True))


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ("", "config.yaml names no training.steps"),
        ("training: {steps: many}", "config.yaml names no training.steps"),
        ("training: [", "config.yaml names no training.steps"),
        ("\xff", "config.yaml names no training.steps"),
        ("training: {steps: 0}", "ZeroDivisionError"),
    ],
)
def test_a_run_whose_files_are_damaged_has_its_line_and_the_others_theirs(
    run: Path, config: str, cause: str
) -> None:
    shutil.copytree(run, run.parent / "bad")
    (run.parent / "bad/config.yaml").write_bytes(config.encode("latin-1"))
    _, bad, whole = describe(run.parent, NOW).splitlines()
    assert whole.split()[:3] == ["run", "100/1,000", "2.5000"]
    assert bad.startswith("bad ")
    if "steps: 0" not in config:  # of which the table divides nothing
        assert bad.endswith(f"cannot be read: {cause}")
    with pytest.raises(ConfigError, match=rf"the run .*bad cannot be read: {cause}"):
        describe(run.parent / "bad", NOW)


def test_figures_that_are_none_do_not_keep_the_table_from_the_others(run: Path) -> None:
    shutil.copytree(run, run.parent / "bad")
    (run.parent / "bad/logs/metrics.jsonl").write_text('{"step": 1, "time": 1, "loss/all": "y"}\n')
    _, bad, whole = describe(run.parent, NOW).splitlines()
    assert "cannot be read: ValueError: " in bad
    assert whole.startswith("run ")


def test_a_run_that_is_closed_to_the_user_has_its_line(run: Path) -> None:
    closed = run.parent / "closed"
    shutil.copytree(run, closed)
    closed.chmod(0)
    try:
        with as_users_are():
            _, first, second = describe(run.parent, NOW).splitlines()
            with pytest.raises(ConfigError, match="closed cannot be read: Permission denied"):
                describe(closed, NOW)
    finally:
        closed.chmod(0o700)
    assert re.fullmatch(
        r"closed +- +- +- +- +cannot be read: Permission denied \(.*/closed/config.yaml\)", first
    )
    assert second.startswith("run ")
