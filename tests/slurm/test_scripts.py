"""What the scripts do by themselves, with stand-ins for Slurm's commands: no cluster, no root."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.launcher.api import LaunchConfig

from slurm.virtual_cluster import wait_until

REPOSITORY = Path(__file__).parents[2]
COMMANDS = {
    "srun": 'while [[ $1 = --* ]]; do shift; done; SLURM_PROCID=0 exec "$@"',
    "scontrol": """case $1 in
        show) [[ $2 = hostnames ]] && echo node1 || echo "JobId=7 Restarts=${RESTARTS:-0} ExcNodeList=(null)" ;;
        requeue) [[ -z ${REFUSED:-} ]] && echo "requeued" >>"$SAID" ;;
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
                ["bash", *words], cwd=REPOSITORY, env=self.variables | variables, stdout=log, stderr=log
            )
        self._started.append(process)
        return process

    def end(self, *words: str, **variables: str) -> int:
        """The exit code of a script."""
        return self.start(*words, **variables).wait(timeout=60)

    def close(self) -> None:
        """End what a failed test has left."""
        for process in self._started:
            process.kill()


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


def signal_ranks(scripts: Scripts, batch: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """As Slurm signals every process of a job."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SAID={scripts.said}\0".encode() in path.read_bytes() and int(path.parent.name) != batch.pid:
                os.kill(int(path.parent.name), number)
    batch.send_signal(number)


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
    signal_ranks(scripts, batch, signal.SIGTERM)
    assert batch.wait(timeout=60) == 75, scripts.log.read_text()
    assert ends(scripts) == [(75, "cancelled", False)]
