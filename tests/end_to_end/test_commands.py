"""`metalm` and its commands: what they are called, how they help, what a shell completes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from metalm.cli import make_parser
from metalm.commands.completion import complete_parser
from metalm.commands.scripts import COMMANDS, find_scripts


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "metalm", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    """Of every command that does something, by its words."""
    return dict(_leaves(complete_parser(), ""))


def _leaves(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield words, parser
    for action in below:
        for word, child in action.choices.items():
            yield from _leaves(child, f"{words} {word}".strip())


def test_every_command_helps_with_an_example_under_its_own_name(
    parsers: dict[str, argparse.ArgumentParser],
) -> None:
    assert parsers.keys() > COMMANDS.keys() | {"train", "status", "tasks show"}
    for words, parser in parsers.items():
        if words != "tasks list":  # which takes nothing
            assert "Example" in parser.format_help(), words
        assert parser.prog == f"metalm {words}", words


def test_a_script_goes_by_the_name_of_its_command() -> None:
    shown = run("prepare", "text", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: metalm prepare text")
    wrong = run("plan")
    assert wrong.returncode == 64 and "metalm plan: error:" in wrong.stderr
    missing = run("inspect", "nowhere")
    assert missing.returncode == 65 and missing.stderr.splitlines()[-1].startswith(
        "metalm inspect: error: nowhere"
    )


@pytest.mark.parametrize(
    ("command", "needed"), [("plan", "pipeline, --gpus"), ("import export", "folder, pipeline")]
)
def test_what_may_be_left_out_is_not_among_what_is_required(command: str, needed: str) -> None:
    told = run(*command.split()).stderr
    assert told.endswith(f"metalm {command}: error: the following arguments are required: {needed}\n")


def test_commands_are_scripts_that_exist_and_are_listed() -> None:
    assert set(COMMANDS.values()) <= find_scripts().keys()
    listed = make_parser().format_help()
    assert all(command.split()[0] in listed for command in COMMANDS)
    assert run("prepare").returncode == 64


def test_bash_completes_commands_and_options_of_scripts() -> None:
    """The script is sourced, and its function asked as bash would."""
    script = run("completion", "bash")
    assert script.returncode == 0, script.stderr
    ask = 'compopt() { :; }; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_metalm; echo "${COMPREPLY[@]}"'

    def complete(*words: str) -> list[str]:
        command = ["bash", "-c", f"{script.stdout}\n{ask}", "bash", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert complete("metalm", "ev") == ["evaluate", "evaluate-tasks"]
    assert complete("metalm", "prepare", "te") == ["text"]
    assert complete("metalm", "prepare", "text", "--paper") == ["--paper-subsets"]
    assert complete("metalm", "evaluate-tasks", "--sh") == ["--shots"]
