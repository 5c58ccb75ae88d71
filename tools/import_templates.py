"""Put the templates of a FLAN or promptsource checkout, read as text and never run, into a task file.

Example: python tools/import_templates.py FLAN/flan/templates.py --group bool_q --task boolq \\
             --rename text=passage --out boolq_flan.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from metalm.cli import ToolParser, run_tool
from metalm.config.load import read_yaml
from metalm.outputs import writing
from metalm.tasks.importing import into_task, read_flan, read_promptsource
from metalm.tasks.task_file import find_tasks


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("templates", type=Path, help="flan/templates.py, or a templates.yaml of promptsource")
    parser.add_argument("--group", help="of FLAN's templates, such as bool_q")
    parser.add_argument(
        "--task", required=True, help="a task file, or the name of one that comes with MetaLM"
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        default=[],
        metavar="NAME=FIELD",
        help="what the templates call a field, answer or options; filters may follow: FIELD|lower",
    )
    parser.add_argument(
        "--labels",
        help="keys of the task's options in the order of promptsource's answer_choices, such as false,true",
    )
    parser.add_argument("--out", type=Path, required=True, help="the task file that is written")
    options = parser.parse_args()
    if (options.templates.suffix == ".py") != (options.group is not None):
        parser.error("--group is for FLAN's templates, a Python file, which needs it")
    if bad := [rename for rename in options.rename if not all(rename.partition("="))]:
        parser.error(f"--rename {bad[0]}: expected NAME=FIELD")
    if options.group is not None:
        wordings = read_flan(options.templates, options.group)
    else:
        wordings = read_promptsource(options.templates)
    made = into_task(
        read_yaml(find_tasks().get(options.task) or Path(options.task)),
        wordings,
        renamed=dict(rename.split("=", 1) for rename in options.rename),
        labels=options.labels.split(",") if options.labels else [],
        origin=str(options.out),
    )
    content = yaml.safe_dump(made.content, sort_keys=False, allow_unicode=True, width=110)
    with writing(options.out, "name another file with --out"):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(f"# The templates are those of {options.templates}.\n{content}")
    for name, why in made.refused.items():
        print(f"left out {name}: {why}", file=sys.stderr)
    print(f"{options.out}: {len(made.content['templates'])} template(s)")


if __name__ == "__main__":
    run_tool(main)
