"""Prepare tasks: word the examples of many datasets, and write them as shards with an index.

If it is interrupted, start the same command again: it goes on where it was.

Example: python tools/prepare_tasks.py --hold-out nli --wordings drawn --out data/flan_without_nli
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from metalm.cli import ToolParser, run_tool
from metalm.data.preparation.example_shards import prepare_examples
from metalm.data.preparation.folder import describe_shards
from metalm.data.preparation.shard_arguments import add_shard_arguments, check_numbers
from metalm.errors import ConfigError
from metalm.tasks.mixture import TaskExamples, Wordings, choose_tasks, lacking
from metalm.tasks.records import TaskData
from metalm.tasks.task_file import TaskFile, find_tasks, load_tasks


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--tasks", help="files or names, with commas between; default: all of --clusters")
    parser.add_argument("--clusters", default="", help="such as nli,sentiment; default: all of text")
    parser.add_argument("--hold-out", default="", help="clusters left out, with what is close to them")
    parser.add_argument("--data", type=Path, default=Path("data/tasks"), help="folder of all tasks' data")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--wordings",
        choices=get_args(Wordings),
        default="first",
        help="of each record: the first (multitask finetuning), one that is drawn, or all",
    )
    parser.add_argument("--most", type=int, help="records of a task; default: what its file takes")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    add_shard_arguments(parser)
    options = parser.parse_args()
    check_numbers(parser, options, [options.most])
    named = _words(options.tasks) if options.tasks else list(find_tasks())
    tasks = load_tasks(named)
    if not options.tasks or options.clusters or options.hold_out:
        clusters = _words(options.clusters) or (sorted({t.cluster for t in tasks}) if options.tasks else [])
        tasks = choose_tasks(tasks, clusters, _words(options.hold_out))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tasks = _without_those_that_lack(tasks, options.split, options.wordings, are_named=bool(options.tasks))
    started = time.monotonic()
    settings = {
        "split": options.split,
        "wordings": options.wordings,
        "most": options.most,
        "seed": options.seed,
    }
    report = prepare_examples(
        [TaskExamples(n, task, options.data, **settings) for n, task in enumerate(tasks)],
        options.out,
        plan={
            "tasks": [task.model_dump(mode="json") for task in tasks],
            "data": [TaskData(task, options.data).digests(options.split) for task in tasks],
            **settings,
        },
        shard_bytes=int(options.shard_mib * 2**20),
        processes=options.processes,
    )
    print(
        describe_shards(
            report, ("examples", "answers", "media", "bytes"), options.out, time.monotonic() - started
        )
    )


def _without_those_that_lack(
    tasks: Sequence[TaskFile], split: str, wordings: Wordings, *, are_named: bool
) -> list[TaskFile]:
    """The tasks that can be trained on so.

    Args:
        are_named: by the user, who is not to miss one.

    Raises:
        ConfigError: one of those that are named cannot, or none can.
    """
    lacks = {task.task: what for task in tasks if (what := lacking(task, split, wordings))}
    told = ", ".join(f"{name} has {what}" for name, what in lacks.items())
    if lacks and (are_named or len(lacks) == len(tasks)):
        raise ConfigError(f"{told}: choose other tasks, or another --split or --wordings")
    if lacks:
        logging.info("left out: %s", told)
    return [task for task in tasks if task.task not in lacks]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    run_tool(main)
