from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from distributed.ranks import run_command

TOOL = Path("tools/plan_run.py")


def run(*arguments: str) -> tuple[int, str]:
    return run_command([sys.executable, str(TOOL), *arguments], timeout_s=120)


def test_the_commands_of_its_help_run_as_typed(tmp_path: Path) -> None:
    commands = [
        line.strip() for line in TOOL.read_text().splitlines() if line.strip().startswith("python tools/")
    ]
    assert len(commands) == 2
    for line in commands:
        words = [str(tmp_path / word) if word.endswith(".png") else word for word in shlex.split(line)[2:]]
        code, output = run(*words)
        assert code == 0, output
        assert "utilisation" in output
        assert "assumed" in output
    assert (tmp_path / "layouts.png").read_bytes().startswith(b"\x89PNG")
    assert "type behind the pipeline" in output


def test_what_the_search_says_to_type_gives_that_layout() -> None:
    search = ("pipelines/demo.yaml", "--gpus", "8", "--gpu", "h100", "--search")
    code, output = run(*search)
    assert code == 0, output
    line = [line for line in output.splitlines() if not line.startswith("metalm: ")][3]
    typed = re.findall(r"\S+=\S+", line)
    code, again = run("pipelines/demo.yaml", "--gpus", "8", "--gpu", "h100", *typed)
    assert code == 0, again
    assert re.search(r"^step +\S+", again, re.M)
    assert f"{float(re.search(r'expected ([0-9.]+) s', again)[1]):.2f} s" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "3", "parallel.tensor=2"), "tensor-parallel groups of 2"),
        (("--gpus", "2", "--gpu", "h101"), "known are a100"),
        (("--gpus", "0"), "'0' is no number above 0"),
        (
            ("--gpus", "2", "--search", "--plot", "absent/x.png"),
            "there is no folder absent; name another file",
        ),
        (("--gpus", "2", "--plot", "x.absent"), "--plot x.absent: Format 'absent' is not supported"),
    ],
)
def test_what_cannot_be_planned_is_one_message(arguments: tuple[str, ...], message: str) -> None:
    code, output = run("pipelines/demo.yaml", *arguments)
    assert code == 64
    assert message in output
    assert "Traceback" not in output
