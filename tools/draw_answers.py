"""Draw what a model answered about a task's images: question, answer and what was right, with their boxes.

Example: python tools/draw_answers.py pointing runs/pointing/tasks/step_*/answers/*.jsonl --out answers.png
"""

from __future__ import annotations

from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.modalities.image import write_png
from metalm.outputs import writing
from metalm.tasks.answer_pictures import draw_answers
from metalm.tasks.task_file import load_task


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("task", help="a file, or the name of one that comes with MetaLM")
    parser.add_argument("answers", type=Path, help="written by `metalm evaluate-tasks`")
    parser.add_argument("--data", type=Path, default=Path("data/tasks"), help="folder of all tasks' data")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a .png")
    parser.add_argument("--count", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--columns", type=int, default=6, help="default: %(default)s")
    options = parser.parse_args()
    if min(options.count, options.columns) < 1:
        parser.error("--count and --columns must be positive")
    task = load_task(options.task)
    drawn = draw_answers(task, options.data, options.answers, options.count, options.columns)
    with writing(options.out, "name another file with --out"):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_png(options.out, drawn)
    print(options.out)


if __name__ == "__main__":
    run_tool(main)
