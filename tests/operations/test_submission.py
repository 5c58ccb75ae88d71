"""What `tools/submit.py` shows and snapshots."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distributed.ranks import run_command
from metalm.config import load_config
from metalm.errors import ConfigError
from metalm.operations.submission import Submission

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("gpus", "each", "layout"), [("a100:1", "1", "2: tensor 2 x data 1"), ("8", "8", "16: tensor 2 x data 8")]
)
def test_the_dry_run_of_the_readme_shows_config_plan_and_line(gpus: str, each: str, layout: str) -> None:
    readme = (REPOSITORY / "slurm/README.md").read_text()
    (typed,) = re.findall(r"^python (tools/submit.py .*--dry-run)", readme, re.MULTILINE)
    code, output = run_command([sys.executable, *shlex.split(typed)], timeout_s=60, SBATCH_GPUS_PER_NODE=gpus)
    assert code == 0, output
    assert "\n  name: first\n" in output
    assert re.search(rf"^ranks +{layout}$", output, re.MULTILINE)
    words = shlex.split(output.splitlines()[-1])
    assert words[:3] == ["sbatch", "--nodes=2", f"--gpus-per-node={each}"]
    assert re.fullmatch(r".*/runs/first/submitted/[\d-]+/code/slurm/pretrain.sbatch", words[-2])
    assert not (REPOSITORY / "runs/first").exists()


def test_a_conversion_is_planned_for_no_ranks() -> None:
    page = (REPOSITORY / "docs/how_to/submit.md").read_text()
    (typed,) = re.findall(r"^metalm (submit .*--template convert .*)", page, re.MULTILINE)
    code, output = run_command(
        [sys.executable, "-m", "metalm", *shlex.split(typed), "--dry-run"], timeout_s=60
    )
    assert code == 0, output
    assert "no ranks to plan for" in output
    words = shlex.split(output.splitlines()[-1])
    assert words[-3].endswith("/convert.sbatch") and words[-1] == "exported/first"


@pytest.mark.parametrize(
    ("words", "fixes"),
    [
        (
            ("--nodes", "2", "--gpus-per-node", "8"),
            ("training.micro_batch_size that divides 2", "2 x 8 on each"),
        ),
        (("--template", "evaluate"), ("start a multiple of 2", "parallel.tensor=1", "1 x 1 on each")),
    ],
)
def test_ranks_that_do_not_fit_are_refused_with_what_to_change(
    words: tuple[str, ...], fixes: tuple[str, ...]
) -> None:
    code, output = run_command(
        [sys.executable, "tools/submit.py", "pipelines/demo.yaml", *words, "--dry-run"], timeout_s=60
    )
    assert code == 64, output
    for fix in (*fixes, "--nodes", "--ranks-per-node"):
        assert fix in output


def test_a_job_gets_the_python_that_submits_it_where_it_would_find_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(REPOSITORY / "pipelines/demo.yaml", [])

    def python_of(**shell: str) -> str | None:
        submission = Submission(config, "stamp", "pretrain.sbatch", 1, None, None, shell=shell)
        return submission.settings().get("METALM_PYTHON")

    assert python_of() == python_of(METALM_PYTHON="") == sys.executable
    assert python_of(METALM_PYTHON="of/mine") == "of/mine"
    assert python_of(METALM_CONTAINER="image.sif") is None
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    assert python_of() is None


def test_a_topology_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    words = ("tools/submit.py", "pipelines/demo.yaml", f"run.folder={tmp_path}", "--nodes", "3")
    code, output = run_command([sys.executable, *words], timeout_s=60)
    assert code == 64, output
    assert not list(tmp_path.iterdir())


def test_a_snapshot_stands_alone(tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "pipelines/demo.yaml", [f"run.folder={tmp_path}", "run.name=kept"])
    shell = {"METALM_PYTHON": "an odd/python", "METALM_CODES": "of another job", "HOME": "/root"}
    submission = Submission(config, "stamp", "finetune.sbatch", 2, None, 4, shell=shell)
    submission.write("abc-dirty")
    folder = tmp_path / "kept/submitted/stamp"
    given = {"METALM_PYTHON": "an odd/python", "METALM_ROOT": str(folder / "code")}
    given |= {"METALM_RANKS_PER_NODE": "4", "METALM_SBATCH_OPTIONS": ""}
    assert submission.settings() == given
    template = folder / "code/slurm/finetune.sbatch"
    show = template.read_text().partition("set -uo pipefail")[0] + "env -0 | grep -z ^METALM_"
    shown = subprocess.run(["bash", "-c", show], capture_output=True, text=True, env={"PATH": "/usr/bin"})
    assert dict(entry.split("=", 1) for entry in shown.stdout.split("\0")[:-1]) == given
    assert submission.command()[-2:] == [
        str(folder / "code/slurm/finetune.sbatch"),
        str(folder / "config.yaml"),
    ]
    written = load_config(folder / "config.yaml", [])
    assert written.model_copy(update={"deepspeed": config.deepspeed}) == config
    for path in (written.deepspeed.decoder, written.deepspeed.encoders):
        assert path.parent == folder and path.is_file()
    assert (folder / "code/src/metalm/cli.py").is_file()
    assert yaml.safe_load((folder / "code/COMMIT").read_text()) == "abc-dirty"
    assert not list(folder.rglob("__pycache__"))
    environment = {"PYTHONPATH": str(folder / "code/src")}
    program = "import metalm.commit as c; print(c.__file__, c.git_commit())"
    code, output = run_command([sys.executable, "-c", program], timeout_s=60, **environment)
    assert (code, output.split()) == (0, [str(folder / "code/src/metalm/commit.py"), "abc-dirty"])


def test_submissions_of_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "pipelines/demo.yaml", [f"run.folder={tmp_path}", "run.name=run"])
    both = [Submission(config, "stamp", "pretrain.sbatch", 1, None, None).write(None) for _ in range(2)]
    assert [one.folder.name for one in both] == ["stamp", "stamp-2"]
    for one in both:
        assert one.command()[-1] == str(one.folder / "config.yaml")
        assert load_config(one.folder / "config.yaml", []).run.name == "run"
    assert both[1].folder.as_posix() in (both[1].folder / "code/slurm/pretrain.sbatch").read_text()


def submit_to(tmp_path: Path, code: int) -> int:
    """Submit a run where sbatch ends with a code."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text(f"#!/bin/sh\nexit {code}\n")
    sbatch.chmod(0o755)
    words = ("tools/submit.py", "pipelines/demo.yaml", f"run.folder={tmp_path}", "parallel.tensor=1")
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    return run_command([sys.executable, *words, "run.name=run"], timeout_s=60, PATH=path)[0]


def test_a_job_that_sbatch_refuses_leaves_nothing_of_a_new_run(tmp_path: Path) -> None:
    assert submit_to(tmp_path, 1) == 64
    assert not (tmp_path / "run").exists()
    assert submit_to(tmp_path, 0) == 0
    before = sorted(tmp_path.rglob("run/**"))
    assert submit_to(tmp_path, 1) == 64
    assert sorted(tmp_path.rglob("run/**")) == before and (tmp_path / "run/logs").is_dir()


def test_a_snapshot_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(REPOSITORY / "pipelines/demo.yaml", [f"run.folder={tmp_path}", "run.name=run"])

    def refuse(*_: Path, **__: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(OSError, match="No space left"):
        Submission(config, "stamp", "pretrain.sbatch", 1, None, None).write(None)
    assert not list(tmp_path.iterdir())


def test_shared_nodes_and_the_clusters_options_are_asked_for(tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "pipelines/demo.yaml", [f"run.folder={tmp_path}"])
    shell = {"METALM_SBATCH_OPTIONS": "--qos=long --gres=gpu:a100:2 --comment='two words'"}
    options = ["--cpus-per-task=8"]
    submission = Submission(
        config, "stamp", "pretrain.sbatch", 1, None, None, options, shell=shell, memory="64G"
    )
    wanted = ["--qos=long", "--gres=gpu:a100:2", "--comment=two words", "--mem=64G", "--cpus-per-task=8"]
    assert submission.command()[-7:-2] == wanted
    assert shlex.split(submission.settings()["METALM_SBATCH_OPTIONS"]) == wanted  # a successor's, too
    submission.write(None)
    template = (submission.folder / "code/slurm/pretrain.sbatch").read_text()
    assert "#SBATCH --requeue" in template
    assert "--exclusive" not in template and "--mem=0" not in template


@pytest.mark.parametrize(
    ("template", "arguments", "first"),
    [("convert", ("exported/x",), "run"), ("evaluate", ("--samples=9",), "run/submitted/stamp/config.yaml")],
)
def test_other_jobs_of_a_run_are_submitted_alike(
    tmp_path: Path, template: str, arguments: tuple[str, ...], first: str
) -> None:
    config = load_config(REPOSITORY / "pipelines/demo.yaml", [f"run.folder={tmp_path}", "run.name=run"])
    words = Submission(config, "stamp", f"{template}.sbatch", 1, None, None, (), arguments).command()
    assert words[-3].endswith(f"/code/slurm/{template}.sbatch")
    assert words[-2:] == [str(tmp_path / first), *arguments]
    assert f"--job-name=run-{template}" in words and "--dependency=singleton" not in words


def test_options_with_an_open_quote_are_refused(tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "pipelines/demo.yaml", [f"run.folder={tmp_path}"])
    shell = {"METALM_SBATCH_OPTIONS": "--comment='two words"}
    submission = Submission(config, "stamp", "pretrain.sbatch", 1, None, None, [], shell=shell)
    with pytest.raises(ConfigError, match="METALM_SBATCH_OPTIONS is .*No closing quotation"):
        submission.command()


@pytest.mark.parametrize(
    ("words", "shell", "message"),
    [
        (("--nodes", "0"), {}, "argument --nodes: '0' is no number above 0"),
        (("--gpus-per-node", "0"), {}, "argument --gpus-per-node: '0' is no number above 0"),
        (("--ranks-per-node", "-1"), {}, "argument --ranks-per-node: '-1' is no number above 0"),
        ((), {"SBATCH_GPUS_PER_NODE": "a100"}, "SBATCH_GPUS_PER_NODE is 'a100'; expected a number above 0"),
        ((), {"METALM_RANKS_PER_NODE": "0"}, "METALM_RANKS_PER_NODE is '0'; expected a number above 0"),
    ],
)
def test_counts_are_numbers_above_0(words: tuple[str, ...], shell: dict[str, str], message: str) -> None:
    command = [sys.executable, "tools/submit.py", "pipelines/demo.yaml", "--dry-run", *words]
    code, output = run_command(command, timeout_s=60, **shell)
    assert code == 64 and message in output, output
    assert "Traceback" not in output
