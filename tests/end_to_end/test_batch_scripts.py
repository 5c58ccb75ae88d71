"""What the batch scripts read of runs and folders, without Slurm: its variables are given by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.tiny import tiny_config
from metalm.errors import ConfigError
from metalm.run_lock import RunLock
from metalm.training.dry_run import print_plan
from tiny_pipeline import REPOSITORY

FUNCTIONS = REPOSITORY / "slurm" / "training_job.sh"


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def call(function: str, *arguments: str, **variables: str) -> str:
    """What one function of the batch script prints, and those that it calls; nothing else of it is run."""
    program = (
        """eval "$(sed -n '/^value_of()/,/^}/p;/^checkpoint_step()/,/^}/p' "$0")"; set -u; """
        + function
        + ' "$@"'
    )
    command = ["bash", "-c", program, str(FUNCTIONS), *arguments]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **variables}
    )
    assert found.stderr == ""
    return found.stdout.removesuffix("\n")


@pytest.mark.parametrize(
    "folder",
    [
        "/data/my runs",
        "/data/größe",
        "/data/it's",
        '/data/"quoted" $(touch executed) `touch executed` \\n',
        "/data/shared storage of the department/runs of the multimodal pretraining project/second half",
    ],
)
def test_the_run_folder_reaches_the_batch_script_as_it_is(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    print_plan(tiny_config(folder), 1)
    plan = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert call("value_of", plan, "run folder") == f"{folder}/tiny"
    assert call("value_of", plan, "initial weights") == "none"
    assert list(tmp_path.iterdir()) == []


def test_initial_weights_are_named_whatever_their_path(capsys: pytest.CaptureFixture[str]) -> None:
    content = tiny_config("runs").model_dump(mode="json")
    content["initialize"]["encoders"] = "runs/null"
    print_plan(type(tiny_config("runs")).model_validate(content), 1)
    assert call("value_of", capsys.readouterr().out, "initial weights") == "encoders"


def test_who_holds_the_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(tmp_path / "tiny")
    print_plan(tiny_config(str(tmp_path)), 1)
    lock.release()
    assert call("value_of", capsys.readouterr().out, "held by").startswith(f"process {os.getpid()} on ")
    print_plan(tiny_config(str(tmp_path)), 1)
    assert call("value_of", capsys.readouterr().out, "held by") == ""


def test_a_folder_of_two_lines_is_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="control characters"):
        tiny_config("runs\nrun folder: /elsewhere")


def test_progress_is_that_of_manifests_and_nothing_is_evaluated(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    assert call("checkpoint_step", run_folder=str(tmp_path)) == "0"
    names = ("step_00000008", "step_00000090", "step_0+a[$(touch executed)0]", "step_99999999999999999999")
    for name in (*names, "step_00000100.partial"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "manifest.json").write_text("{}")
    (checkpoints / "step_00000200").mkdir()  # without a manifest
    for latest in ("step_00000008\n", "step_0+a[$(touch executed)0]", ""):
        (checkpoints / "latest").write_text(latest)
        assert call("checkpoint_step", run_folder=str(tmp_path)) == "90"
    assert not list(tmp_path.rglob("executed")) and not Path("executed").exists()


def test_parts_are_joined_though_the_task_that_joined_them_was_killed(tmp_path: Path) -> None:
    inputs = [tmp_path / f"{number}.jsonl" for number in range(2)]
    for path in inputs:
        path.write_text("".join(json.dumps({"text": f"a small boat {n}"}) + "\n" for n in range(20)))
    python = [sys.executable, str(REPOSITORY / "tools" / "train_tokenizer.py")]
    tokenizer = tmp_path / "tokenizer"
    subprocess.run([*python, str(inputs[0]), "--vocab-size", "300", "--out", str(tokenizer)], check=True)
    lost_node = tmp_path / "lost_node"
    lost_node.write_text(
        "#!/usr/bin/env bash\n"
        "if [[ $* == *index_shards* ]]; then kill -KILL $PPID; exit 137; fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    lost_node.chmod(0o755)

    def task(number: int, python: str) -> tuple[int, str]:
        variables = {
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "METALM_PYTHON": python,
        }
        words = [str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--", *map(str, inputs)]
        found = subprocess.run(
            ["bash", str(REPOSITORY / "slurm" / "prepare.sbatch"), "tools/prepare_text.py", *words],
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
        )
        return found.returncode, found.stdout + found.stderr

    assert task(0, sys.executable)[0] == 0
    assert task(1, str(lost_node))[0] == -9
    assert not (tmp_path / "out" / "index.json").exists()
    code, output = task(1, sys.executable)
    assert code == 0 and "is ready;" in output, output
    index = (tmp_path / "out" / "index.json").read_bytes()
    code, output = task(0, sys.executable)
    assert code == 0 and "is ready already" in output, output
    assert (tmp_path / "out" / "index.json").read_bytes() == index
