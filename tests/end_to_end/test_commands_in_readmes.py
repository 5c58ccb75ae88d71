"""Commands that READMEs show exist as shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from metalm import errors
from metalm.config import load_config

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


def shown_commands() -> list[str]:
    """Every line of every bash block, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_dry_run_runs_as_typed() -> None:
    (command,) = [line for line in shown_commands() if "--dry-run" in line]
    words = shlex.split(command)
    assert words[0] == "metalm"
    found = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "tensor 2 x data 1" in found.stdout


@pytest.mark.parametrize("target", ["demo", "reproduce", "test", "check"])
def test_make_knows_its_targets_and_their_tools_exist(target: str) -> None:
    found = subprocess.run(["make", "--dry-run", target], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    for tool in re.findall(r"tools/\w+\.py", found.stdout):
        assert (REPOSITORY / tool).is_file(), tool


def test_everything_that_commands_name_is_there() -> None:
    words = [word for line in shown_commands() for word in shlex.split(line)]
    named = [word for word in words if re.match(r"(pipelines|tools|slurm|deepspeed_configs)/", word)]
    assert named
    for name in named:
        assert (REPOSITORY / name).is_file(), name


def test_overrides_in_the_text_are_accepted() -> None:
    (line,) = re.findall(r"`metalm train X\.yaml (.*?)`", README)
    load_config(REPOSITORY / "pipelines" / "demo.yaml", shlex.split(line))


def test_the_exit_codes_are_the_programs() -> None:
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    defined = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert shown == defined
