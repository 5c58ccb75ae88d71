"""The `metalm` command, and how every tool ends: one message and one exit code.

Commands import what they need when they run, so that `--help` answers without loading torch.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from metalm import __version__
from metalm.errors import EXIT_DONE, EXIT_FAULT, EXIT_USAGE, ConfigError, MetaLMError
from metalm.operations.preflight_limits import Limits
from metalm.parallel.launch import rank_of
from metalm.project_files import project_root

if TYPE_CHECKING:
    from metalm.config import RunConfig
    from metalm.data.corpus import Corpus


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a program: a user's mistake ends with its message and exit code."""
    try:
        code = main()
    except MetaLMError as error:
        program = Path(sys.argv[0]).name.replace("__main__.py", "metalm")
        _say_once(f"{program}: error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception:
        traceback.print_exc()
        code = EXIT_FAULT
    sys.exit(EXIT_DONE if code is None else code)


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

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n")


def main() -> NoReturn:
    """Entry point of the `metalm` command."""
    run_tool(lambda: _run_command(sys.argv[1:]))


def _run_command(arguments: Sequence[str]) -> int | None:
    parser = ToolParser(prog="metalm", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"metalm {__version__}")
    parser.add_argument(
        "--files",
        action="version",
        version=str(project_root()),
        help="print the folder of pipelines, deepspeed_configs, slurm and tools, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ToolParser)

    train = commands.add_parser("train", help="train, or resume, the run of a pipeline file")
    train.add_argument("pipeline", type=Path, help="a file, or the name of one that comes with MetaLM")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    train.add_argument("--ranks", type=int, help="with --dry-run: plan for this many ranks")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="evaluate the newest checkpoint of a run")
    evaluate.add_argument("pipeline", type=Path)
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.add_argument("--samples", type=int, default=64, help="samples to generate per held-out source")
    evaluate.set_defaults(run=_evaluate)

    tool = commands.add_parser("tool", help="run one of MetaLM's tools", add_help=False)
    tool.add_argument("name", nargs="?", help="such as prepare_text; without it, they are listed")
    tool.add_argument("arguments", nargs=argparse.REMAINDER)
    tool.set_defaults(run=_tool)

    status = commands.add_parser("status", help="tell how a run is doing, from its folder alone")
    status.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder, such as runs/NAME")
    status.set_defaults(run=_status)

    stop = commands.add_parser("stop", help="ask a run to save and end")
    stop.add_argument("run_folder", type=Path, metavar="RUN", help="the run's folder, such as runs/NAME")
    stop.set_defaults(run=_stop)

    preflight = commands.add_parser("preflight", help="check the nodes of a job before a run starts on them")
    preflight.add_argument("run_folder", type=Path, metavar="RUN", help="where the run will write")
    for limit in dataclasses.fields(Limits):
        name = f"--{limit.name.replace('_', '-')}"
        preflight.add_argument(name, type=float, default=limit.default, **limit.metadata)
    preflight.add_argument("--deadline-s", type=float, default=40.0, help="for reports, and again for links")
    preflight.add_argument("--mebibytes", type=int, default=64, help="size of the tensor that is summed")
    preflight.add_argument("--bad-nodes", type=Path, help="file for the names of nodes that are not fit")
    preflight.set_defaults(run=_preflight)

    generate = commands.add_parser("generate", help="continue a prompt with an exported model")
    generate.add_argument("folder", type=Path, help="written by tools/convert_to_hf.py")
    generate.add_argument("--prompt", default="", help="text; without a marker, images are encoded with it")
    generate.add_argument(
        "--image", type=Path, action="append", default=[], help="may be given several times"
    )
    generate.add_argument("--num-beams", type=int, default=1)
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk with an exported model: /image PATH, /forget, end of input")
    chat.add_argument("folder", type=Path, help="written by tools/convert_to_hf.py")
    chat.add_argument("--web", action="store_true", help="on a page of this machine's browser instead")
    chat.add_argument("--port", type=int, default=7860, help="of the page (default: %(default)s)")
    chat.set_defaults(run=_chat)
    for command in (generate, chat):
        command.add_argument("--max-new-tokens", type=int, default=64)
        command.add_argument("--temperature", type=float, default=0.0, help="above 0: sample")
        command.add_argument("--device", default="cpu")

    options, rest = parser.parse_known_args(arguments)
    # argparse does not take positional arguments up again after an option: `train X.yaml --dry-run a.b=c`.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options.run(options)


def _train(options: argparse.Namespace) -> int | None:
    from metalm.config import load_config
    from metalm.parallel.launch import find_launch
    from metalm.training.monitor.sinks import check_sinks

    config = load_config(options.pipeline, options.overrides)
    check_sinks(config)
    if options.dry_run:
        from metalm.training.dry_run import print_plan

        return print_plan(config, options.ranks or find_launch(os.environ).world_size)
    corpus = _prepare_training(config)
    from metalm.training.loop import train

    return train(corpus)


def _evaluate(options: argparse.Namespace) -> int | None:
    from metalm.config import load_config

    config = load_config(options.pipeline, options.overrides)
    corpus = _prepare_training(config)
    from metalm.training.evaluate import evaluate

    return evaluate(corpus, options.samples)


def _tool(options: argparse.Namespace) -> None:
    """A tool is a script, so that it is the same in the repository and installed."""
    tools = {script.stem: script for script in sorted((project_root() / "tools").glob("*.py"))}
    if options.name is None:
        for name, script in tools.items():
            documentation = ast.get_docstring(ast.parse(script.read_text())) or ""
            print(f"{name:<24}{documentation.partition(chr(10))[0]}")
        return
    name = options.name.replace("-", "_")
    if name not in tools:
        raise ConfigError(f"there is no tool {options.name!r}; there are {', '.join(tools)}")
    os.execv(sys.executable, [sys.executable, str(tools[name]), *options.arguments])


def _generate(options: argparse.Namespace) -> None:
    from metalm.conversion.generate import generate_from_folder

    answer = generate_from_folder(
        options.folder,
        options.prompt,
        options.image,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        temperature=options.temperature,
        seed=options.seed,
        device=options.device,
    )
    print(answer)


def _chat(options: argparse.Namespace) -> None:
    if options.web:
        from metalm.conversion.chat_page import serve_page

        serve_page(
            options.folder,
            options.port,
            functools.partial(print, flush=True),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            device=options.device,
        )
        return
    from metalm.conversion.chat import chat_with_folder

    chat_with_folder(
        options.folder,
        iter(sys.stdin.readline, ""),
        print,
        hear=functools.partial(print, end="", flush=True),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        device=options.device,
    )


def _status(options: argparse.Namespace) -> int | None:
    from metalm.operations.status import status

    return status(options.run_folder)


def _stop(options: argparse.Namespace) -> int | None:
    from metalm.operations.stop import stop

    return stop(options.run_folder)


def _preflight(options: argparse.Namespace) -> int | None:
    from metalm.operations.preflight import preflight

    limits = Limits(**{limit.name: getattr(options, limit.name) for limit in dataclasses.fields(Limits)})
    return preflight(
        options.run_folder,
        limits,
        deadline_s=options.deadline_s,
        mebibytes=options.mebibytes,
        bad_nodes=options.bad_nodes,
    )


def _prepare_training(config: RunConfig) -> Corpus:
    """Refuse what cannot start, and set up what the libraries of training read when they are imported.

    DeepSpeed gets its device. Megatron has torch import its compiler for fused functions, none of which a
    run calls: it is set not to. Its notes on what is not installed stay off the terminal.
    """
    from metalm.parallel.launch import find_launch
    from metalm.training.check_start import check_start

    corpus = check_start(config, find_launch(os.environ).world_size)
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
    return corpus


if __name__ == "__main__":
    main()
