"""What the scripts do by themselves, with stand-ins for Slurm's commands: no cluster, no root."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig

from metalm.operations.stop import stop
from slurm.virtual_cluster import wait_until

REPOSITORY = Path(__file__).parents[2]
COMMANDS = {
    "srun": 'while [[ $1 = --* ]]; do shift; done; SLURM_PROCID=0 exec "$@"',
    "scontrol": """case "$1 $2" in
        'show hostnames') echo node1 ;;
        'show job') echo "JobId=7 Restarts=${RESTARTS:-0} ExcNodeList=(null)" ;;
        requeue*) echo requeued >>"$SAID" ;;
    esac""",
    "sinfo": 'sleep "${SINFO_S:-0}"',
    "squeue": "echo 1:00:00",
    "sbatch": """printf '<%s>' "$@" >>"$SAID" """,
    "sleep": '[[ $1 != 60 ]] || exit 0; exec /bin/sleep "$@"',
}


class Scripts:
    """A job's environment on a node where Slurm's commands are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.said = folder / "said"
        """What the job has asked Slurm for."""
        self.log = folder / "log"
        self._started: list[subprocess.Popen[bytes]] = []
        (folder / "bin").mkdir()
        for name, script in COMMANDS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\n{script}\n")
            path.chmod(0o755)
        self.variables = {name: value for name, value in os.environ.items() if "METALM" not in name} | {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "SAID": str(self.said),
            "METALM_PYTHON": str(REPOSITORY / "tests/slurm/trainer.sh"),
            "METALM_LAUNCHER": "srun",
            "METALM_PREFLIGHT": "no",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_PARTITION": "main",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_NNODES": "1",
            "SLURM_NODEID": "0",
            "SLURMD_NODENAME": "localhost",
        }

    def start(self, *words: str, **variables: str) -> subprocess.Popen[bytes]:
        """A script with its arguments; all it prints goes to the log."""
        with self.log.open("a") as log:
            process = subprocess.Popen(
                ["bash", *words],
                cwd=REPOSITORY,
                env=self.variables | variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def end(self, *words: str, **variables: str) -> int:
        """The exit code of a script."""
        return self.start(*words, **variables).wait(timeout=60)

    def close(self) -> None:
        """End what a test has left."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    """In an empty folder."""
    running = Scripts(tmp_path)
    yield running
    running.close()


def python(scripts: Scripts, script: str) -> str:
    """A stand-in for Python."""
    path = scripts.folder / "python"
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("given", "seconds"), [({}, 600), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90)])
def test_torchrun_gives_ranks_the_time_to_save(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], seconds: int
) -> None:
    told = python(scripts, "echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert scripts.end("slurm/node.sh", "node1", "29500", "1", "true", METALM_PYTHON=told, **given) == 0
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", scripts.log.read_text().strip())
    assert LaunchConfig(1, 1, 1).shutdown_timeout == seconds  # torch reads it under this name


def pretrain(scripts: Scripts, *overrides: str, **variables: str) -> subprocess.Popen[bytes]:
    """The batch script with the stand-in for training."""
    words = ("slurm/pretrain.sbatch", "any.yaml", f"run.folder={scripts.folder}", *overrides)
    return scripts.start(*words, **variables)


def wait_for_start(scripts: Scripts) -> None:
    wait_until((scripts.run / "checkpoints/latest").exists, "the rank has saved", timeout_s=30)


def signal_ranks(scripts: Scripts, program: str, number: signal.Signals) -> None:
    """Signal the job's processes that have this in their command."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_of_job = f"SAID={scripts.said}\0".encode() in (folder / "environ").read_bytes()
            if is_of_job and program.encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), number)


def events(scripts: Scripts) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (scripts.run / "logs/attempts.jsonl").read_text().splitlines()]


def ends(scripts: Scripts) -> list[tuple[int, str, bool]]:
    """Code and cause of each end, and whether the job comes back."""
    return [
        (entry["code"], entry["cause"], entry["comes_back"])
        for entry in events(scripts)
        if entry["event"] == "end"
    ]


def test_the_ranks_code_stands_though_they_end_while_slurm_is_asked(scripts: Scripts) -> None:
    batch = pretrain(scripts, SINFO_S="3")
    wait_for_start(scripts)
    for program in ("launch.sh", "trainer.sh", "pretrain.sbatch"):  # as Slurm does
        signal_ranks(scripts, program, signal.SIGTERM)
    assert batch.wait(timeout=60) == 75, scripts.log.read_text()
    assert ends(scripts) == [(75, "cancelled", False)]


@pytest.mark.parametrize("first", ["operator", "job"])
def test_an_operators_stop_near_the_time_limit_ends(scripts: Scripts, first: str) -> None:
    batch = pretrain(scripts, "saves_s=3")
    wait_for_start(scripts)
    if first == "operator":
        stop(scripts.run)
        batch.send_signal(signal.SIGUSR2)
        wait_until(lambda: "time limit is near" in scripts.log.read_text(), "the job asks, too", timeout_s=30)
    else:
        batch.send_signal(signal.SIGUSR2)
        wait_until((scripts.run / "stop").exists, "the job has asked", timeout_s=30)
        stop(scripts.run)
    assert batch.wait(timeout=60) == 75
    ((code, cause, comes_back),) = ends(scripts)
    assert (code, comes_back) == (75, False)
    assert cause.startswith(f"asked to stop: {getpass.getuser()} 20")
    assert not scripts.said.exists()


def test_an_operators_stop_holds_though_no_rank_has_seen_it(scripts: Scripts) -> None:
    batch = pretrain(scripts, "hangs=7")
    wait_for_start(scripts)
    time.sleep(1)
    stop(scripts.run)
    signal_ranks(scripts, "rank.sh", signal.SIGKILL)
    assert batch.wait(timeout=60) == 137, scripts.log.read_text()
    ((_, cause, comes_back),) = ends(scripts)
    assert f"vanished, srun ended with 137 (out of memory?), asked to stop: {getpass.getuser()} 20" in cause
    assert not comes_back and not scripts.said.exists()
    assert not (scripts.run / "stop").exists()


def test_an_operators_stop_holds_for_a_job_that_slurm_has_queued_again(scripts: Scripts) -> None:
    batch = pretrain(scripts, RESTARTS="1")
    wait_for_start(scripts)
    stop(scripts.run)
    assert batch.wait(timeout=60) == 75
    assert ends(scripts) == [(75, "queued again by Slurm", True)]
    assert pretrain(scripts, RESTARTS="1", SLURM_RESTART_COUNT="1").wait(timeout=60) == 75
    code, cause, comes_back = ends(scripts)[-1]
    assert (code, comes_back) == (75, False)
    assert cause.startswith(f"asked to stop before it started: {getpass.getuser()} 20")
    assert pretrain(scripts, "steps=9", RESTARTS="2", SLURM_RESTART_COUNT="2").wait(timeout=60) == 0


def test_a_stop_file_of_any_content_leaves_a_readable_record(scripts: Scripts) -> None:
    scripts.run.mkdir()
    (scripts.run / "stop").write_text('ann\tsays "stop"\x1b[2J \\ now\nsecond line\n')
    assert pretrain(scripts).wait(timeout=60) == 75
    assert ends(scripts) == [(75, "asked to stop before it started: annsays stop[2J  now", False)]


@pytest.mark.parametrize(("restart", "code"), [("1", 75), ("0", 0)])
def test_an_answered_stop_holds_for_the_same_job_that_was_killed_after_it(
    scripts: Scripts, restart: str, code: int
) -> None:
    (scripts.run / "logs").mkdir(parents=True)
    (scripts.run / "logs/stop_answered").write_text("somebody\n")
    batch = pretrain(scripts, "steps=3", RESTARTS=restart, SLURM_RESTART_COUNT=restart)
    assert batch.wait(timeout=60) == code
    assert not (scripts.run / "logs/stop_answered").exists()


def test_a_jobs_own_request_brings_it_back(scripts: Scripts) -> None:
    batch = pretrain(scripts)
    wait_for_start(scripts)
    batch.send_signal(signal.SIGUSR2)
    assert batch.wait(timeout=60) == 75
    assert ends(scripts) == [(75, "time limit", True)]
    assert scripts.said.read_text() == "requeued\n"


@pytest.mark.parametrize("second", ["no_colon", "{here}/empty:", "{here}/absent:{here}/local"])
def test_data_to_copy_that_are_not_there_end_a_job_at_once(scripts: Scripts, second: str) -> None:
    (scripts.folder / "data").mkdir()
    (scripts.folder / "data/file").write_text("x")
    (scripts.folder / "empty").mkdir()  # a copy without a place to go to would be made in the root folder
    staged = f"{{here}}/data:{{here}}/local,{second}".format(here=scripts.folder)
    assert pretrain(scripts, METALM_STAGE=staged).wait(timeout=60) == 64
    assert f"METALM_STAGE: {staged.partition(',')[2]} is not of the form" in scripts.log.read_text()
    assert not (scripts.folder / "local").exists()  # nothing is copied in vain
    cause = "the data could not be copied to the nodes' disks: see the job's log"
    assert ends(scripts) == [(64, cause, False)]
    assert not scripts.said.exists()


def test_a_disk_that_takes_no_data_is_a_nodes_fault(scripts: Scripts) -> None:
    (scripts.folder / "data").mkdir()
    (scripts.folder / "data/file").write_text("x")
    (scripts.folder / "local").write_text("no folder")
    staged = f"{scripts.folder}/data:{scripts.folder}/local"
    assert pretrain(scripts, METALM_STAGE=staged).wait(timeout=60) == 69
    assert [(code, comes_back) for code, _, comes_back in ends(scripts)] == [(69, True)]
    assert scripts.said.read_text() == "requeued\n"


def cluster_file(scripts: Scripts, *lines: str) -> str:
    path = scripts.folder / "cluster.env"
    path.write_text("\n".join([f"export METALM_CLUSTER={path}", *lines, ""]))
    return str(path)


def test_what_is_set_for_a_job_wins_over_the_cluster_file(scripts: Scripts) -> None:
    """Also where a script of the job sources the file once more."""
    own, executed = "it's $(touch {0}) `touch {0}` \\ \"", scripts.folder / "executed"
    own = own.format(executed)
    settings = (
        "METALM_COME_BACK=submit",
        "METALM_LAUNCHER=torchrun",
        "METALM_WORD=other",
        "METALM_MAX_STARTS=1",
    )
    given = cluster_file(scripts, *(f"export {setting}" for setting in settings))
    told = "echo rank $METALM_WORD starts in $METALM_MAX_STARTS; exit 70"
    trainer = python(scripts, f'[[ $* != *--dry-run* ]] || exec tests/slurm/trainer.sh "$@"; {told}')
    variables = {"METALM_CLUSTER": given, "METALM_COME_BACK": "never", "METALM_WORD": own}
    assert pretrain(scripts, METALM_PYTHON=trainer, **variables).wait(timeout=60) == 70
    assert f"rank {own} starts in 1" in scripts.log.read_text()
    assert [comes_back for _, _, comes_back in ends(scripts)] == [False]
    assert not scripts.said.exists() and not executed.exists()


def test_a_successor_gets_options_with_blanks(scripts: Scripts) -> None:
    executed = scripts.folder / "executed"
    options = ["--comment=two words", "--mail-user=it's", f"--wckey=$(touch {executed})*", "--qos=long"]
    variables = {"METALM_COME_BACK": "submit", "METALM_SBATCH_OPTIONS": shlex.join(options)}
    batch = pretrain(scripts, "fails=70@6", **variables)
    assert batch.wait(timeout=60) == 70
    said = scripts.said.read_text()
    assert "".join(f"<{option}>" for option in options) + f"<{REPOSITORY}/slurm/pretrain.sbatch>" in said
    assert not executed.exists()


@pytest.mark.parametrize("setting", ["METALM_SBATCH_OPTIONS", "METALM_PREFLIGHT"])
def test_a_quote_that_does_not_end_is_refused(scripts: Scripts, setting: str) -> None:
    assert pretrain(scripts, **{setting: "--comment='two words"}).wait(timeout=60) == 64
    assert f"{setting} has a quote that does not end: --comment='two words" in scripts.log.read_text()


def prepare(scripts: Scripts, task: int, array: str, num_inputs: int = 5) -> subprocess.Popen[bytes]:
    """A task of an array with a stand-in for preparation, which takes a second and fails as `fails` says."""
    fails = 'if [[ $2 = $(cat "$(dirname "$SAID")/fails") ]]; then exit 65; fi'
    prepared = f'echo "$2" >>"$SAID"; sleep 1; {fails}; mkdir -p "$6"; touch "$6/index.json" "$6/$2.tar"'
    tool = python(scripts, f'[[ $1 != *prepare_text.py ]] && touch "$2/index.json" || {{ {prepared}; }}')
    numbers = [int(number) for number in array.replace("0-2", "0,1,2").split(",")]
    inputs = [str(number) for number in range(num_inputs)]
    words = ("slurm/prepare.sbatch", "tools/prepare_text.py", str(scripts.folder / "out"), "--", *inputs)
    return scripts.start(
        *words,
        METALM_PYTHON=tool,
        SLURM_ARRAY_TASK_ID=str(task),
        SLURM_ARRAY_TASK_MIN=str(min(numbers)),
        SLURM_ARRAY_TASK_MAX=str(max(numbers)),
        SLURM_ARRAY_TASK_COUNT=str(len(numbers)),
    )


def inputs_of(scripts: Scripts, *tasks: tuple[int, str]) -> tuple[list[int], list[str]]:
    """Exit codes of tasks that run at once, and the inputs that they prepared."""
    scripts.said.write_text("")
    codes = [task.wait(timeout=60) for task in [prepare(scripts, *task) for task in tasks]]
    return codes, sorted(scripts.said.read_text().split())


def test_tasks_that_failed_are_submitted_again_by_their_numbers(scripts: Scripts) -> None:
    (scripts.folder / "fails").write_text("1")
    assert inputs_of(scripts, (0, "0-2"), (1, "0-2"), (2, "0-2")) == ([0, 65, 0], ["0", "1", "2", "3"])
    assert not (scripts.folder / "out/index.json").exists()
    (scripts.folder / "fails").write_text("none")
    assert inputs_of(scripts, (1, "1")) == ([0], ["1", "4"])
    assert (scripts.folder / "out/index.json").exists()
    assert len(list((scripts.folder / "out").glob("*.tar"))) == 5


def test_no_two_tasks_prepare_the_same_input_at_once(scripts: Scripts) -> None:
    (scripts.folder / "fails").write_text("none")
    assert inputs_of(scripts, (1, "0-2")) == ([0], ["1", "4"])
    codes, prepared = inputs_of(scripts, (1, "1,2"), (1, "1"), (2, "1,2"))
    assert sorted(codes) == [0, 0, 64]
    assert prepared == ["1", "2", "4"]


@pytest.mark.parametrize(("task", "array"), [(1, "1,2"), (3, "3")])
def test_a_task_whose_share_is_not_known_prepares_nothing(scripts: Scripts, task: int, array: str) -> None:
    (scripts.folder / "fails").write_text("none")
    if task == 3:
        assert inputs_of(scripts, (0, "0-2"))[0] == [0]
    assert inputs_of(scripts, (task, array)) == ([64], [])
    told = {1: "the first submission for ", 3: "the files are shared by tasks 0 to 2: this one has none. To "}
    assert told[task] in scripts.log.read_text()
