"""What `tools/submit.py` shows and snapshots."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from distributed.ranks import run_command
from metalm.config import load_config
from metalm.operations.submission import Submission

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_dry_run_of_the_readme_shows_config_plan_and_line() -> None:
    readme = (REPOSITORY / "slurm/README.md").read_text()
    (typed,) = re.findall(r"^python (tools/submit.py .*--dry-run)", readme, re.MULTILINE)
    code, output = run_command(
        [sys.executable, *shlex.split(typed)], timeout_s=60, SBATCH_GPUS_PER_NODE="a100:1"
    )
    assert code == 0, output
    assert "\n  name: first\n" in output
    assert "\nranks           2: tensor 2 x data 1\n" in output
    words = shlex.split(output.splitlines()[-1])
    assert words[0].startswith("METALM_ROOT=") and words[0].endswith("/code")
    assert words[1:4] == ["sbatch", "--nodes=2", "--gpus-per-node=1"]
    assert words[-2] == words[0].removeprefix("METALM_ROOT=") + "/slurm/pretrain.sbatch"
    assert not (REPOSITORY / "runs/first").exists()


def test_a_topology_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    words = ("tools/submit.py", "pipelines/demo.yaml", f"run.folder={tmp_path}", "--nodes", "3")
    code, output = run_command([sys.executable, *words], timeout_s=60)
    assert code == 64, output
    assert not list(tmp_path.iterdir())


def test_a_snapshot_stands_alone(tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "pipelines/demo.yaml", [f"run.folder={tmp_path}", "run.name=kept"])
    submission = Submission(config, "stamp", "finetune.sbatch", 2, None, 4)
    submission.write("abc-dirty")
    folder = tmp_path / "kept/submitted/stamp"
    assert submission.environment() == {"METALM_ROOT": str(folder / "code"), "METALM_RANKS_PER_NODE": "4"}
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
