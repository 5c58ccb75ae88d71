"""Say what a run needs before it is submitted: bytes, communication, operations, time. Starts nothing.

Times come as a range with what it hangs on; files that tools/calibrate.py, tools/check_gpu.py or metalm
preflight --calibration wrote narrow it.

Examples:
    python tools/plan_run.py pipelines/demo.yaml --gpus 2 --gpu cpu
    python tools/plan_run.py pipelines/demo.yaml --gpus 8 --search --plot layouts.png training.steps=200
"""

import argparse
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.commands.argument_types import positive
from metalm.config import load_config
from metalm.outputs import require_file_place
from metalm.planning.calibration import overlay
from metalm.planning.devices import DEVICES, find_device
from metalm.planning.plan import plan_run
from metalm.planning.plan_picture import plot_memory
from metalm.planning.report import (
    SHOWN_LAYOUTS,
    describe_batch,
    describe_cost,
    describe_memory,
    describe_search,
)
from metalm.planning.search import search_layouts
from metalm.planning.shipped_calibration import shipped_calibration
from metalm.planning.workload import USUAL, Assumed


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=positive, required=True, help="ranks, one device each")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--search", action="store_true", help="the layouts that fit, best first")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="bytes per rank by kind, over the layouts")
    parser.add_argument(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="measured figures, in place of the shipped ones; may be given several times",
    )
    for option, default, about in (
        ("--caption-tokens", USUAL.caption_tokens, "mean length of a caption"),
        ("--example-tokens", USUAL.example_tokens, "mean length of the texts of an example"),
        ("--example-media", USUAL.example_media, "images or clips of an example"),
    ):
        parser.add_argument(option, type=positive, default=default, help=f"{about} (default: %(default)s)")
    arguments, rest = parser.parse_known_args()
    # argparse does not take positional arguments up again after an option.
    if any(word.startswith("-") or "=" not in word for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides += rest
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.plot and not arguments.plot.exists():
        require_file_place(arguments.plot, "name another file with --plot")
    config = load_config(arguments.pipeline, arguments.overrides)
    device = find_device(arguments.gpu)
    calibration = shipped_calibration(device)
    for path in arguments.calibration:
        calibration = overlay(calibration, path)
    assumed = Assumed(arguments.caption_tokens, arguments.example_tokens, arguments.example_media)
    given = (config, arguments.gpus, device, calibration)
    if arguments.search:
        found = search_layouts(*given, assumed=assumed)
        print(describe_search(found, config))
        plans = found.plans[:SHOWN_LAYOUTS] or ([found.smallest] if found.smallest else [])
    else:
        plans = [plan_run(*given, assumed=assumed)]
    print(f"\n{describe_batch(plans[0])}\n\n{describe_memory(plans[0])}\n\n{describe_cost(plans[0])}")
    if arguments.plot:
        plot_memory(plans, arguments.plot)
    return 0


if __name__ == "__main__":
    run_tool(main)
