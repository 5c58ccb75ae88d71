"""MetaLM: pretrain, finetune, prompt and evaluate language models as general-purpose interfaces.

The `metalm` command, and how every tool ends: one message and one exit code.

Commands import what they need when they run, so that `--help` answers without loading torch.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from metalm import __version__
from metalm.commands import answering, operations, scripts, tasks, training
from metalm.errors import EXIT_DONE, EXIT_FAULT, EXIT_USAGE, MetaLMError
from metalm.outputs import is_no_room
from metalm.progress import rank_of
from metalm.project_files import project_root


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a program: a user's mistake ends with its message and exit code."""
    try:
        code = main()
    except MetaLMError as error:
        _say_once(f"{_program()}: error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if is_no_room(error):
            _say_once(f"{_program()}: error: {error}: make room, and start the same command again")
        else:
            traceback.print_exc()
        code = EXIT_FAULT
    sys.exit(EXIT_DONE if code is None else code)


def _program() -> str:
    return Path(sys.argv[0]).name.replace("__main__.py", "metalm")


def _say_once(message: str) -> None:
    """Print what all ranks found: the first says it, and the others give it the time to.

    A launcher ends all ranks when one has ended. A rank that is left alone with its error, as when a file is
    missing on its node, says it in the end.
    """
    rank = rank_of(os.environ)
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    if rank:
        time.sleep(1.0 if joined else 10.0)
        if joined:  # such errors are raised together
            return
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)


class ToolParser(argparse.ArgumentParser):
    """An argument parser whose usage errors end with the project's exit code for usage."""

    def __init__(self, documentation: str = "", **settings: Any) -> None:
        """As argparse's.

        Args:
            documentation: a script's docstring: its first line stands before the options, the rest, with
                its example, behind them.
            settings: argparse's own.
        """
        if documentation:
            first, _, rest = inspect.cleandoc(documentation).partition("\n")
            settings |= {"description": first, "epilog": rest.strip()}
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's, but what may be given any number of times is never named among what is required."""
        action = super().add_argument(*names, **settings)
        if action.nargs == argparse.ZERO_OR_MORE and not action.option_strings:
            action.required = False
        return action

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n")


def main() -> NoReturn:
    """Entry point of the `metalm` command."""
    run_tool(lambda: _run_command(sys.argv[1:]))


def _run_command(arguments: Sequence[str]) -> int | None:
    scripts.run_if_named(arguments)
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse does not take positional arguments up again after an option: `train X.yaml --dry-run a.b=c`.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options.run(options)


def make_parser() -> ToolParser:
    """The parser of `metalm` and of all its commands."""
    parser = ToolParser(prog="metalm", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"metalm {__version__}")
    parser.add_argument(
        "--files",
        action="version",
        version=str(project_root()),
        help="print the folder of pipelines, deepspeed_configs, slurm and tools, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (training, operations, answering, tasks, scripts):
        group.add_commands(commands)
    return parser


if __name__ == "__main__":
    main()
