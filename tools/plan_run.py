"""Say what a run needs before it is submitted: bytes, communication, operations, time. Starts nothing.

Examples:
    python tools/plan_run.py pipelines/demo.yaml --gpus 2 --gpu cpu
    python tools/plan_run.py pipelines/demo.yaml --gpus 8 --search --plot layouts.png training.steps=200
"""

import argparse
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.config import load_config
from metalm.errors import ConfigError
from metalm.planning.devices import DEVICES, find_device
from metalm.planning.plan import Assumptions, plan_run
from metalm.planning.plan_picture import plot_memory
from metalm.planning.report import (
    SHOWN_LAYOUTS,
    describe_batch,
    describe_cost,
    describe_memory,
    describe_search,
)
from metalm.planning.search import search_layouts


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, required=True, help="ranks, one device each")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--search", action="store_true", help="the layouts that fit, best first")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="bytes per rank by kind, over the layouts")
    defaults = Assumptions()
    parser.add_argument("--compute-efficiency", type=float, default=defaults.compute_efficiency)
    parser.add_argument("--link-efficiency", type=float, default=defaults.link_efficiency)
    parser.add_argument("--caption-tokens", type=int, default=defaults.caption_tokens)
    arguments, rest = parser.parse_known_args()
    # argparse does not take positional arguments up again after an option.
    if any(word.startswith("-") or "=" not in word for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides += rest
    return arguments


def main() -> int:
    arguments = parse_arguments()
    shares = (arguments.compute_efficiency, arguments.link_efficiency)
    if arguments.gpus < 1 or arguments.caption_tokens < 1 or not all(0 < share <= 1 for share in shares):
        raise ConfigError("--gpus and --caption-tokens must be positive, efficiencies above 0 and at most 1")
    config = load_config(arguments.pipeline, arguments.overrides)
    device = find_device(arguments.gpu)
    assumptions = Assumptions(*shares, arguments.caption_tokens)
    if arguments.search:
        found = search_layouts(config, arguments.gpus, device, assumptions)
        print(describe_search(found, config))
        plans = found.plans[:SHOWN_LAYOUTS]
    else:
        plans = [plan_run(config, arguments.gpus, device, assumptions)]
    if plans:
        print(f"\n{describe_batch(plans[0])}\n\n{describe_memory(plans[0])}\n\n{describe_cost(plans[0])}")
    if arguments.plot and plans:
        plot_memory(plans, arguments.plot)
    return 0


if __name__ == "__main__":
    run_tool(main)
