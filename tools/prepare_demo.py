"""Prepare what pipelines/demo.yaml reads: raw data, a tokenizer, shards. Each step is another tool.

Example: python tools/prepare_demo.py data/demo
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metalm.cli import ToolParser, run_tool
from metalm.commands.argument_types import positive
from metalm.data.preparation.folder import require_equal_plans
from metalm.errors import ConfigError
from metalm.outputs import writing
from metalm.regular_files import read_regular, replace_file


def steps(out: Path, scenes: int, evaluation_scenes: int, text_mib: float) -> Iterator[list[str]]:
    """Each tool with its arguments."""
    raw, shards, tokenizer = f"{out}/raw", f"{out}/shards", f"{out}/tokenizer"
    amount = ["--scenes", str(scenes), "--evaluation-scenes", str(evaluation_scenes)]
    yield ["make_demo_data", raw, "--image-size", "48", *amount, "--text-mib", str(text_mib)]
    texts, captions = f"{raw}/text/train.jsonl", f"{raw}/scenes/train.jsonl"
    yield ["train_tokenizer", texts, "--captions", captions, "--vocab-size", "2048", "--out", tokenizer]
    for split in ("train", "heldout"):
        size = ["--tokenizer", tokenizer, "--shard-mib", "4"]
        yield ["prepare_text", f"{raw}/text/{split}.jsonl", *size, "--out", f"{shards}/text_{split}"]
    for split in ("train", "heldout", "unseen"):
        yield ["prepare_image_text", f"{raw}/scenes/{split}.jsonl", "--out", f"{shards}/scenes_{split}"]
    for split in ("train", "heldout", "text"):
        files = [f"{raw}/chats/{split}.jsonl", "--media-folder", f"{raw}/scenes"]
        yield ["prepare_chat", *files, "--out", f"{shards}/chats_{split}"]


def record_plan(out: Path, plan: Mapping[str, Any]) -> None:
    """Begin, or go on with, the demo data of these options, before any of the tools replaces a file.

    Raises:
        ConfigError: the folder holds data of other options, or of unknown ones; or it cannot be written.
    """
    path = out / "preparation" / "plan.json"
    with writing(out, "name another folder"):
        if path.exists():
            try:
                recorded = dict(json.loads(read_regular(path)))
            except (ValueError, TypeError):
                raise ConfigError(f"{path} cannot be read: name a new folder, or remove {out}") from None
            require_equal_plans(out, recorded, plan)
        elif any((out / name).exists() for name in ("raw", "tokenizer", "shards")):
            raise ConfigError(
                f"{out} holds data, and no record of the options that made them: name a new folder, or "
                "remove that one"
            )
        replace_file(path, json.dumps(plan, indent=1) + "\n")


def main() -> int:
    parser = ToolParser(__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path("data/demo"), help="default: %(default)s")
    parser.add_argument(
        "--scenes", type=positive, default=20_000, help="training scenes (default: %(default)s)"
    )
    parser.add_argument("--evaluation-scenes", type=positive, default=1_000, help="default: %(default)s")
    parser.add_argument("--text-mib", type=float, default=12, help="most text, in MiB (default: %(default)s)")
    options = parser.parse_args()
    record_plan(options.out, {name: value for name, value in vars(options).items() if name != "out"})
    written = options.out / "raw" / "written"
    for tool, *arguments in steps(**vars(options)):
        if tool == "make_demo_data" and written.exists():
            continue  # files that are written again count as changed for the tools behind
        print(f"metalm tool {tool} {shlex.join(arguments)}", flush=True)
        script = Path(__file__).with_name(f"{tool}.py")
        code = subprocess.run([sys.executable, str(script), *arguments]).returncode
        if code:
            return code
        if tool == "make_demo_data":
            replace_file(written, "")
    return 0


if __name__ == "__main__":
    run_tool(main)
