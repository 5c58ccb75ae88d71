"""Sum up a finished demo run: a table on the terminal, and `summary.json` in the run's folder.

Example: python tools/summarise_demo.py runs/demo
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from metalm.cli import ToolParser, run_tool
from metalm.data.demo.scoring import attribute_accuracy
from metalm.errors import DataError
from metalm.run_metrics import read_metrics

SUMMARY_NAME = "summary.json"


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    run = parser.parse_args().run
    summary = summarise(run)
    (run / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n")
    for name, value in summary.items():
        print(f"{name:<40} {value:12.6g}")


def summarise(run: Path) -> dict[str, float]:
    """The figures of a run that was trained, evaluated and exported.

    Raises:
        DataError: a step was left out.
    """
    metrics = read_metrics(run)
    text_losses = [entry["held_out/text"] for entry in metrics if "held_out/text" in entry]
    speeds = [entry["speed/tokens_per_second"] for entry in metrics if "speed/tokens_per_second" in entry]
    if len(text_losses) < 2 or not speeds:
        raise DataError(f"{run} holds no finished training")
    losses = _read(run / "evaluation.json")["losses"]
    return {
        "text_loss_first": text_losses[0],
        "text_loss_last": text_losses[-1],
        "caption_loss_right_image": losses["scenes"],
        "caption_loss_wrong_image": losses["scenes/wrong_image"],
        "attribute_accuracy": _accuracy(run / "samples_scenes.jsonl"),
        "attribute_accuracy_unseen_combinations": _accuracy(run / "samples_scenes_unseen.jsonl"),
        "tokens_per_second": statistics.median(speeds),
        "hf_logit_difference": max(case["largest_difference"] for case in _read(run / "hf" / "proof.json")),
    }


def _accuracy(path: Path) -> float:
    try:
        samples = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: evaluate the run first") from None
    return attribute_accuracy([s["generated"] for s in samples], [s["reference"] for s in samples])


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: evaluate and export the run first") from None


if __name__ == "__main__":
    run_tool(main)
