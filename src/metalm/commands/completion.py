"""What a shell needs to complete `metalm` and its commands."""

from __future__ import annotations

import argparse
import sys
from typing import Any
from unittest import mock

import shtab

from metalm import cli
from metalm.commands.scripts import COMMANDS, find_scripts, load_script


def print_completion(shell: str) -> None:
    """Print what completes `metalm` in this shell: bash, zsh or tcsh."""
    print(shtab.complete(complete_parser(), shell))


def complete_parser() -> argparse.ArgumentParser:
    """The parser of `metalm` in which the commands that are scripts have their options, too."""
    parser = cli.make_parser()
    for command, name in COMMANDS.items():
        *group, last = command.split()
        parsers = _subparsers(parser)
        for word in group:
            parsers = _subparsers(parsers[word])
        parsers[last] = _parser_of(command, name)
    return parser


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def _parser_of(command: str, script: str) -> argparse.ArgumentParser:
    """A script's parser, as it is when it begins to read the command line."""

    reading = True

    class Recorder(cli.ToolParser):
        def parse_known_args(self, *words: Any, **settings: Any) -> Any:
            if reading:
                raise _Found(self)
            return super().parse_known_args(*words, **settings)

    with (
        mock.patch.object(cli, "ToolParser", Recorder),
        mock.patch.object(sys, "argv", [f"metalm {command}"]),
    ):
        try:
            load_script(find_scripts()[script], script).main()
        except _Found as found:
            reading = False
            return found.args[0]
    raise AssertionError(f"tools/{script}.py reads no command line")


class _Found(Exception):
    """Carries a parser out of a script's `main`."""
