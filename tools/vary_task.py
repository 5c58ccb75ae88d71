"""Make of tasks: texts to pretrain on, other wordings, shuffled answers, questions without their images.

texts: the training side's texts, as Pile-like JSON Lines. worded: its examples as worded, for a tokenizer.
encoded: tasks of which all but the answer is encoded. shuffled: with the training answers of other records.
mismatched: with the test images of other records. blind: without images. All but encoded and blind check
that no `group` of records is on two sides.

Example: python tools/vary_task.py shuffled data/real/vader/tasks/vader_films.yaml --out data/shuffled
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.outputs import writing
from metalm.progress import Phase
from metalm.reproduction.variants import (
    write_blind,
    write_encoded,
    write_mismatched,
    write_shuffled,
    write_texts,
    write_worded,
)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("what", choices=("texts", "worded", "encoded", "shuffled", "mismatched", "blind"))
    parser.add_argument("tasks", type=Path, nargs="+", help="task files")
    parser.add_argument("--data", type=Path, default=Path("data/real"), help="folder of all tasks' data")
    parser.add_argument("--fields", default="text", help="of `texts`: those of a record, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=1000, help="of `worded`: examples of a task")
    parser.add_argument("--out", type=Path, required=True, help="a file of texts, else a folder")
    options = parser.parse_args()
    with writing(options.out, "name another place with --out"):
        _write(options)


def _write(options: argparse.Namespace) -> None:
    if options.what == "texts":
        fields = options.fields.split(",")
        with Phase("writing texts"):
            count = write_texts(options.tasks, options.data, fields, options.out, options.seed)
        print(f"{count:,} texts in {options.out}")
        return
    if options.what == "worded":
        with Phase("writing texts"):
            count = write_worded(options.tasks, options.data, options.out, options.most)
        print(f"{count:,} texts in {options.out}")
        return
    for path in Phase.over("writing tasks", options.tasks, "tasks"):
        if options.what == "encoded":
            write_encoded(path, options.out)
        elif options.what == "blind":
            write_blind(path, options.out)
        elif options.what == "mismatched":
            write_mismatched(path, options.data, options.out, options.seed)
        else:
            write_shuffled(path, options.data, options.out, options.seed)


if __name__ == "__main__":
    run_tool(main)
