"""`metalm tasks` and `metalm evaluate-tasks`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from metalm.commands.argument_types import counts, positive, readers, seed, words
from metalm.commands.starting import join_ranks
from metalm.errors import ConfigError
from metalm.progress import Phase


def add_commands(commands: Any) -> None:
    scores = commands.add_parser(
        "evaluate-tasks",
        help="score a run or an exported model on tasks",
        epilog="Example: metalm evaluate-tasks exported/demo --tasks mnli,hellaswag --shots 0,1,4",
    )
    scores.add_argument("model", type=Path, help="a run's folder, or one written by convert_to_hf.py")
    scores.add_argument("overrides", nargs="*", metavar="section.key=value", help="of a run's config")
    scores.add_argument("--tasks", type=words, required=True, help="files or names, with commas between")
    scores.add_argument("--data", type=Path, default=Path("data/tasks"), help="folder of all tasks' data")
    scores.add_argument(
        "--shots", type=counts, help="demonstrations, such as 0,1,4: in the in-context wording"
    )
    scores.add_argument("--templates", type=positive, help="average over so many wordings; default: 1")
    scores.add_argument("--score-by", choices=("likelihood", "generation"), help="default: the task's")
    scores.add_argument("--split", help="default: the task's")
    scores.add_argument("--limit", type=positive, help="questions of a task, drawn from all")
    scores.add_argument("--seed", type=seed, default=0, help="of demonstrations and --limit")
    scores.add_argument("--readers", type=readers, help="who reads what, such as text=scene,image=scene")
    scores.add_argument("--overflow", choices=("split", "cut_left", "cut_right"), default="split")
    scores.add_argument("--batch-size", type=positive, default=16, help="documents at once, on each rank")
    scores.add_argument("--device", default="cpu", help="of an exported model; cuda: a GPU each process")
    scores.add_argument(
        "--out", type=Path, help="default: tasks/ in the export's folder, tasks/step_N/ in the run's"
    )
    scores.set_defaults(run=_evaluate_tasks)

    tasks = commands.add_parser("tasks", help="look at task files and their data").add_subparsers(
        dest="what", required=True
    )
    tasks.add_parser("list", help="the tasks that come with MetaLM").set_defaults(run=_list_tasks)
    check = tasks.add_parser(
        "check",
        help="read all of a task's data, and word them in every way",
        epilog="Example: metalm tasks check mnli",
    )
    check.set_defaults(run=_check_task)
    show = tasks.add_parser(
        "show",
        help="print the first examples of a split as they are learnt",
        epilog="Example: metalm tasks show mnli --split validation -n 3",
    )
    show.set_defaults(run=_show_task)
    for command in (check, show):
        command.add_argument("task", help="a file, or the name of one that comes with MetaLM")
        command.add_argument(
            "--data", type=Path, default=Path("data/tasks"), help="folder of all tasks' data"
        )
    show.add_argument("--split", help="default: that which the task is evaluated on")
    show.add_argument("-n", "--examples", type=positive, default=3)
    show.add_argument("--template", metavar="ID", help="default: all")
    show.add_argument("--pictures", type=Path, metavar="FOLDER", help="write images, with their texts, there")


def _evaluate_tasks(options: argparse.Namespace) -> None:
    with Phase("loading what reads tasks"):
        from metalm.parallel.launch import find_launch
        from metalm.tasks.task_file import load_tasks
        from metalm.tasks.ways import TaskSettings

    tasks = load_tasks(options.tasks)
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
        with Phase("loading transformers"):
            from metalm.conversion.export_answerer import evaluate_export

        evaluate_export(
            options.model,
            tasks,
            settings,
            options.out,
            batch_size=options.batch_size,
            device=options.device,
            launch=find_launch(os.environ),
        )
        return
    from metalm.training.check_start import open_run

    joined = join_ranks(lambda ranks: open_run(options.model, options.overrides, ranks))
    with Phase("loading DeepSpeed and Megatron", told=True):
        from metalm.training.evaluate_tasks import evaluate_run

    evaluate_run(joined, tasks, settings, options.out, batch_size=options.batch_size)


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
