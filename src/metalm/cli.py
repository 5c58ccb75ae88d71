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
    from metalm.training.joining import Joined


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
    train.add_argument(
        "pipeline", nargs="?", type=Path, help="a file, or the name of one that comes with MetaLM"
    )
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved run, check its data and stop"
    )
    train.add_argument("--ranks", type=int, help="with --dry-run: plan for this many ranks")
    train.add_argument(
        "--without-data",
        action="store_true",
        help="with --dry-run: leave unchecked what is read, as where the data are elsewhere",
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="evaluate the newest checkpoint of a run")
    evaluate.add_argument("pipeline", nargs="?", type=Path, help="as of train")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.add_argument("--samples", type=int, default=64, help="samples to generate per held-out source")
    evaluate.set_defaults(run=_evaluate)

    tool = commands.add_parser("tool", help="run one of MetaLM's tools", add_help=False)
    tool.add_argument("name", nargs="?", help="such as prepare_text; without it, they are listed")
    tool.add_argument("arguments", nargs=argparse.REMAINDER)
    tool.set_defaults(run=_tool)

    status = commands.add_parser("status", help="tell how a run, or each of a folder, is doing")
    status.add_argument(
        "run_folder",
        type=Path,
        metavar="RUN",
        help="the run's folder, such as runs/NAME; or that of all runs",
    )
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

    scores = commands.add_parser("evaluate-tasks", help="score a run or an exported model on tasks")
    scores.add_argument("model", type=Path, help="a run's folder, or one written by convert_to_hf.py")
    scores.add_argument("overrides", nargs="*", metavar="section.key=value", help="of a run's config")
    scores.add_argument("--tasks", type=_words, required=True, help="files or names, with commas between")
    scores.add_argument("--data", type=Path, default=Path("data/tasks"), help="folder of all tasks' data")
    scores.add_argument(
        "--shots", type=_counts, help="demonstrations, such as 0,1,4: in the in-context wording"
    )
    scores.add_argument("--templates", type=_positive, help="average over so many wordings; default: 1")
    scores.add_argument("--score-by", choices=("likelihood", "generation"), help="default: the task's")
    scores.add_argument("--split", help="default: the task's")
    scores.add_argument("--limit", type=_positive, help="questions of a task, drawn from all")
    scores.add_argument("--seed", type=int, default=0, help="of demonstrations and --limit")
    scores.add_argument("--readers", type=_readers, help="who reads what, such as text=scene,image=scene")
    scores.add_argument("--overflow", choices=("split", "cut_left", "cut_right"), default="split")
    scores.add_argument("--batch-size", type=_positive, default=16, help="documents at once, on each rank")
    scores.add_argument("--device", default="cpu", help="of an exported model")
    scores.add_argument("--out", type=Path, help="default: tasks/ in the model's folder")
    scores.set_defaults(run=_evaluate_tasks)

    tasks = commands.add_parser("tasks", help="look at task files and their data").add_subparsers(
        dest="what", required=True, parser_class=ToolParser
    )
    tasks.add_parser("list", help="the tasks that come with MetaLM").set_defaults(run=_list_tasks)
    check = tasks.add_parser("check", help="read all of a task's data, and word them in every way")
    check.set_defaults(run=_check_task)
    show = tasks.add_parser("show", help="print the first examples of a split as they are learnt")
    show.set_defaults(run=_show_task)
    for command in (check, show):
        command.add_argument("task", help="a file, or the name of one that comes with MetaLM")
        command.add_argument(
            "--data", type=Path, default=Path("data/tasks"), help="folder of all tasks' data"
        )
    show.add_argument("--split", help="default: that which the task is evaluated on")
    show.add_argument("-n", "--examples", type=_positive, default=3)
    show.add_argument("--template", metavar="ID", help="default: all")
    show.add_argument("--pictures", type=Path, metavar="FOLDER", help="write images, with their texts, there")

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
    from metalm.training.check_start import check_start
    from metalm.training.monitor.sinks import check_sinks

    def read_config() -> RunConfig:
        config = load_config(_pipeline(options), options.overrides)
        check_sinks(config)
        return config

    if options.dry_run:
        from metalm.training.dry_run import dry_run

        ranks = options.ranks or find_launch(os.environ).world_size
        return dry_run(read_config(), ranks, with_data=not options.without_data)
    joined = _join(lambda ranks: check_start(read_config(), ranks))
    from metalm.training.loop import train

    return train(joined)


def _pipeline(options: argparse.Namespace) -> Path:
    """The pipeline file that was given."""
    given = options.pipeline
    if given is not None and ("=" not in str(given) or given.exists()):
        return given
    shipped = sorted(path.name for path in (project_root() / "pipelines").glob("*.yaml"))
    raise ConfigError(
        f"metalm {options.command} needs a pipeline file before any section.key=value, such as "
        f"`metalm {options.command} demo.yaml`; these come with MetaLM: {', '.join(shipped)}"
    )


def _evaluate(options: argparse.Namespace) -> int | None:
    from metalm.config import load_config
    from metalm.training.check_start import check_start

    joined = _join(lambda ranks: check_start(load_config(_pipeline(options), options.overrides), ranks))
    from metalm.training.evaluate import evaluate

    return evaluate(joined, options.samples)


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


def _evaluate_tasks(options: argparse.Namespace) -> None:
    from metalm.tasks.task_file import load_task
    from metalm.tasks.ways import TaskSettings

    tasks = [load_task(name) for name in options.tasks]
    settings = TaskSettings(
        data=options.data,
        shots=options.shots,
        templates=options.templates,
        scored_by=options.score_by,
        split=options.split,
        limit=options.limit,
        seed=options.seed,
        readers=options.readers,
        overflow=options.overflow,
    )
    if (options.model / "config.json").is_file():
        if options.overrides:
            raise ConfigError(f"{options.model} is an exported model: {options.overrides[0]} is for runs")
        from metalm.conversion.export_answerer import evaluate_export

        evaluate_export(
            options.model, tasks, settings, options.out, batch_size=options.batch_size, device=options.device
        )
        return
    from metalm.training.check_start import open_run

    joined = _join(lambda ranks: open_run(options.model, options.overrides, ranks))
    from metalm.training.evaluate_tasks import evaluate_run

    evaluate_run(joined, tasks, settings, options.out, batch_size=options.batch_size)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError("give one or more, with commas between")
    return words


def _counts(text: str) -> tuple[int, ...]:
    if not all(word.isdecimal() for word in _words(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers with commas between, such as 0,1,4")
    return tuple(map(int, _words(text)))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _readers(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in _words(text)]
    if not all(name and encoder for name, _, encoder in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: say who reads what, such as text=E1,image=E2")
    return {name: encoder for name, _, encoder in pairs}


def _list_tasks(options: argparse.Namespace) -> None:
    from metalm.tasks.showing import list_tasks

    for line in list_tasks():
        print(line)


def _check_task(options: argparse.Namespace) -> None:
    from metalm.tasks.showing import check_task

    for line in check_task(options.task, options.data):
        print(line)


def _show_task(options: argparse.Namespace) -> None:
    from metalm.tasks.showing import show_task

    for line in show_task(
        options.task, options.data, options.split, options.examples, options.template, options.pictures
    ):
        print(line)


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


def _join(prepare: Callable[[int], Corpus]) -> Joined:
    """Join the ranks of a job, with what the first rank of each node has read and checked.

    What cannot start is refused before anything that is slow to load is imported.

    Args:
        prepare: reads and checks, for so many ranks.

    Collective: all ranks of the job.
    """
    from metalm.parallel.launch import find_launch

    launch = find_launch(os.environ)
    own: Corpus | MetaLMError | None = None
    if launch.local_rank == 0:
        try:
            own = prepare(launch.world_size)
        except MetaLMError as error:
            if launch.world_size == 1:
                raise
            own = error  # the other ranks are told
    _set_up_libraries()
    from metalm.training.joining import join

    return join(launch, own)


def _set_up_libraries() -> None:
    """Set what the libraries of training read when they are imported.

    DeepSpeed gets its device. Megatron has torch import its compiler for fused functions, none of which a
    run calls: it is set not to. Its notes on what is not installed stay off the terminal.
    """
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")


if __name__ == "__main__":
    main()
