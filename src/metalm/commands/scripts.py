"""The commands of `metalm` that are scripts in tools/: the same in the repository and installed.

And their completion, which asks each script for its options.
"""

from __future__ import annotations

import argparse
import ast
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metalm.errors import ConfigError
from metalm.project_files import project_root

COMMANDS = {
    "prepare text": "prepare_text",
    "prepare pairs": "prepare_image_text",
    "prepare audio": "prepare_audio_text",
    "prepare chat": "prepare_chat",
    "prepare interleaved": "prepare_interleaved",
    "prepare tasks": "prepare_tasks",
    "prepare demo": "prepare_demo",
    "prepare tokenizer": "train_tokenizer",
    "index": "index_shards",
    "check": "check_shards",
    "plan": "plan_run",
    "submit": "submit",
    "inspect": "inspect_checkpoint",
    "prune": "prune_checkpoints",
    "convert": "convert_to_hf",
    "refresh": "refresh_export",
    "import export": "convert_from_hf",
    "import decoder": "import_decoder",
    "import templates": "import_templates",
    "import tokenizer": "complete_tokenizer",
    "fetch": "fetch_data",
    "reproduce": "reproduce",
    "calibrate": "calibrate",
}
"""The script of each command, of one or two words."""
GROUPS = {"prepare": "raw data to shards", "import": "what was made elsewhere, or exported"}
"""What the commands of two words that begin alike have in common."""


def run_if_named(arguments: Sequence[str]) -> None:
    """Run the script whose command the arguments begin with, if they do."""
    for words in (2, 1):
        command = " ".join(arguments[:words])
        if command in COMMANDS:
            _run_script(find_scripts()[COMMANDS[command]], f"metalm {command}", arguments[words:])


def add_commands(commands: Any) -> None:
    groups = {
        name: commands.add_parser(name, help=text).add_subparsers(
            dest="what", required=True, metavar="COMMAND"
        )
        for name, text in GROUPS.items()
    }
    for command, name in COMMANDS.items():
        *group, last = command.split()
        parsers = groups[group[0]] if group else commands
        parsers.add_parser(last, help=_first_line(find_scripts()[name]), add_help=False)

    completion = commands.add_parser(
        "completion",
        help="print what a shell needs to complete all of this",
        epilog="Example: metalm completion bash > ~/.local/share/bash-completion/completions/metalm",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run=_completion)

    tool = commands.add_parser(
        "tool",
        help="run any script of tools/ by its name",
        epilog="Example: metalm tool make_demo_data data/demo/raw",
    )
    tool.add_argument("name", nargs="?", help="such as prepare_text; without it, they are listed")
    tool.add_argument("arguments", nargs=argparse.REMAINDER)
    tool.set_defaults(run=_tool)


def _completion(options: argparse.Namespace) -> None:
    from metalm.commands.completion import print_completion

    print_completion(options.shell)


def _tool(options: argparse.Namespace) -> None:
    scripts = find_scripts()
    if options.name is None:
        for name, script in scripts.items():
            print(f"{name:<24}{_first_line(script)}")
        return
    name = options.name.replace("-", "_")
    if name not in scripts:
        raise ConfigError(f"there is no tool {options.name!r}; there are {', '.join(scripts)}")
    _run_script(scripts[name], f"metalm tool {name}", options.arguments)


def find_scripts() -> dict[str, Path]:
    """The files of tools/ by name."""
    return {script.stem: script for script in sorted((project_root() / "tools").glob("*.py"))}


def _first_line(script: Path) -> str:
    documentation = ast.get_docstring(ast.parse(script.read_text())) or ""
    return documentation.partition("\n")[0].replace("%", "%%")


def _run_script(script: Path, program: str, arguments: Sequence[str]) -> None:
    """Run a script as `python script` does, except that it goes by the name by which it was called."""
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(script.parent))
    sys.modules["__main__"] = load_script(script, "__main__")


def load_script(script: Path, name: str) -> types.ModuleType:
    """Execute a script of tools/ as a module of this name."""
    module = types.ModuleType(name)
    module.__file__ = str(script)
    if name == "__main__":  # before it runs, for processes that it starts
        sys.modules[name] = module
    exec(compile(script.read_text(), script, "exec"), module.__dict__)
    return module
