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
            "SLURM_JOB_ID": str(10 + number),
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": "1",
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "METALM_PYTHON": python,
        }
        words = [str(tmp_path / "out"), f"--tokenizer={tokenizer}", "--", *map(str, inputs)]
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


def test_data_are_copied_to_a_nodes_disk_again_only_where_they_differ(tmp_path: Path) -> None:
    source, disk = tmp_path / "große Daten", tmp_path / "local disk/data"
    (source / "part 1").mkdir(parents=True)
    for name in ("a.tar", "part 1/b.tar", "part 1/c.tar"):
        (source / name).write_bytes(name.encode())

    def stage(pairs: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(REPOSITORY / "slurm" / "stage.sh")]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "METALM_STAGE": pairs}
        )

    assert stage(f"{source}:{disk}").returncode == 0
    (disk / "a.tar").write_bytes(b"other")  # of the same size
    (disk / "part 1/b.tar").write_bytes(b"cut")
    found = stage(f"{source}:{disk},{source / 'part 1'}:{tmp_path / 'second'}")
    assert (found.returncode, found.stderr) == (0, "")
    copied = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.tar")}
    assert copied["local disk/data/a.tar"] == b"other"
    assert copied["local disk/data/part 1/b.tar"] == copied["second/b.tar"] == b"part 1/b.tar"
    assert len(copied) == 3 + 3 + 2 and not list(tmp_path.rglob("*.partial"))
    links = tmp_path / "links"
    links.mkdir()
    (links / "part 1").symlink_to(source / "part 1")
    (links / "c.tar").symlink_to(source / "a.tar")
    assert stage(f"{links}:{tmp_path / 'third'}").returncode == 0
    assert (tmp_path / "third/part 1/b.tar").read_bytes() == b"part 1/b.tar"
    assert not (tmp_path / "third/c.tar").is_symlink()
    (links / "d.tar").symlink_to(tmp_path / "absent")
    found = stage(f"{links}:{tmp_path / 'fourth'}")
    assert (found.returncode, "d.tar is a link that leads nowhere" in found.stderr) == (65, True)
    found = stage(f"{tmp_path / 'absent'}:{disk}")
    assert (found.returncode, "is not of the form FROM:TO" in found.stderr) == (64, True)


def test_a_container_of_apptainer_is_around_every_command(tmp_path: Path) -> None:
    apptainer = tmp_path / "bin/apptainer"
    apptainer.parent.mkdir()
    apptainer.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    apptainer.chmod(0o755)
    program = f". {REPOSITORY}/slurm/cluster.sh; run_python -m metalm status 'a run'"
    settings = {"METALM_CONTAINER": "metalm.sif", "METALM_MOUNTS": "/data:/data", "SLURM_GPUS_ON_NODE": "4"}

    def shown(runtime: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": f"{apptainer.parent}:{os.environ['PATH']}", "METALM_CONTAINER_RUNTIME": runtime}
        command = ["bash", "-uc", program]
        return subprocess.run(command, capture_output=True, text=True, env={**settings, **variables})

    python = [".venv/bin/python", "-m", "metalm", "status", "a run"]
    around = ["exec", "--pwd", str(REPOSITORY), "--bind", str(REPOSITORY), "--bind", "/data:/data", "--nv"]
    assert shown("apptainer").stdout.splitlines() == [*around, "metalm.sif", *python]
    refused = shown("docker")
    assert refused.returncode == 64
    assert "METALM_CONTAINER_RUNTIME is docker, expected pyxis or apptainer" in refused.stderr


def test_tasks_get_the_jobs_environment_whatever_sbatch_was_told(tmp_path: Path) -> None:
    """As after `sbatch --export=NONE`: srun starts its tasks without the environment, unless it is told."""
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(
        "#!/usr/bin/env bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        "own=(SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NNODES=1)\n"
        '[[ ${SLURM_EXPORT_ENV:-ALL} = NONE ]] || exec env "${own[@]}" "$@"\n'
        'exec env -i PATH="$PATH" "${own[@]}" "$@"\n'
    )
    (srun.parent / "scontrol").write_text("#!/usr/bin/env bash\necho localhost\n")
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$MASTER_ADDR $METALM_NODES" >"$METALM_CODES/seen"\n')
    for program in (*srun.parent.iterdir(), python):
        program.chmod(0o755)
    variables = {
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
        "SLURM_EXPORT_ENV": "NONE",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "METALM_LAUNCHER": "srun",
        "METALM_PYTHON": str(python),
        "METALM_CODES": str(tmp_path),
    }
    command = ["bash", str(REPOSITORY / "slurm" / "launch.sh"), "train", "x.yaml"]
    found = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "seen").read_text() == "localhost localhost\n"
