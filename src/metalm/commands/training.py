"""`metalm train` and `metalm evaluate`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalm.commands.argument_types import natural, positive
from metalm.commands.starting import join_ranks
from metalm.errors import ConfigError
from metalm.progress import Phase, say
from metalm.project_files import project_root
from metalm.shown_url import shown_override

if TYPE_CHECKING:
    from metalm.config import RunConfig


def add_commands(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train, or resume, the run of a pipeline file",
        epilog="Example: torchrun --nproc-per-node 2 -m metalm train demo.yaml run.name=first",
    )
    train.add_argument(
        "pipeline", nargs="?", type=Path, help="a file, or the name of one that comes with MetaLM"
    )
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved run, check its data and stop"
    )
    train.add_argument("--ranks", type=positive, help="with --dry-run: plan for this many ranks")
    train.add_argument(
        "--without-data",
        action="store_true",
        help="with --dry-run: leave unchecked what is read, as where the data are elsewhere",
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate the newest checkpoint of a run",
        epilog="Example: torchrun --nproc-per-node 2 -m metalm evaluate demo.yaml run.name=first",
    )
    evaluate.add_argument("pipeline", nargs="?", type=Path, help="as of train")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.add_argument(
        "--samples", type=natural, default=64, help="samples to generate per held-out source"
    )
    evaluate.set_defaults(run=_evaluate)


def _train(options: argparse.Namespace) -> int | None:
    given = {"--ranks": options.ranks is not None, "--without-data": options.without_data}
    if not options.dry_run and any(given.values()):
        alone = next(name for name in given if given[name])
        raise ConfigError(
            f"{alone} is for --dry-run: `torchrun --nproc-per-node N -m metalm train ...` starts N ranks"
        )
    say(_named(options))
    with Phase("loading the schema of configurations", told=True):
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
    joined = join_ranks(lambda ranks: check_start(read_config(), ranks))
    with Phase("loading DeepSpeed and Megatron", told=True):
        from metalm.training.loop import train

    return train(joined)


def _evaluate(options: argparse.Namespace) -> int | None:
    say(_named(options))
    with Phase("loading the schema of configurations", told=True):
        from metalm.config import load_config
        from metalm.training.check_start import check_start

    joined = join_ranks(lambda ranks: check_start(load_config(_pipeline(options), options.overrides), ranks))
    with Phase("loading DeepSpeed and Megatron", told=True):
        from metalm.training.evaluate import evaluate

    return evaluate(joined, options.samples)


def _named(options: argparse.Namespace) -> str:
    given = [] if options.pipeline is None else [str(options.pipeline)]
    return " ".join([options.command, *map(shown_override, [*given, *options.overrides])])


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
