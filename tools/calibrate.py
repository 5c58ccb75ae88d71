"""Measure on this machine what a plan's times are made of: a file for plan_run.py --calibration.

Links are measured by metalm preflight --calibration, from all ranks of a job.

Examples:
    python tools/calibrate.py cpu.json
    python tools/calibrate.py cpu.json --beside 2 --threads 1     as with two ranks on this machine
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from metalm.cli import ToolParser, run_tool
from metalm.commands.argument_types import positive
from metalm.commands.starting import set_up_libraries
from metalm.outputs import require_file_place
from metalm.progress import Phase
from metalm.project_files import project_root


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="JSON")
    parser.add_argument(
        "--beside", type=positive, default=1, help="copies that measure at once, sharing cores and memory"
    )
    parser.add_argument("--threads", type=positive, help="of each copy, on CPU")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's seconds for this process, on a machine that others use, too",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    require_file_place(arguments.out, "name another file")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as copies:
        for number in range(1, arguments.beside):
            copy = copies.enter_context(subprocess.Popen([*_command(arguments), f"{folder}/{number}.json"]))
            copies.callback(copy.kill)
        measure(arguments)
    print(arguments.out)
    return 0


def _command(arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, __file__]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    return command


def measure(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with Phase("loading DeepSpeed and Megatron"):
        import torch

        set_up_libraries()
        from metalm.training.calibrate import calibrate, process_or_wall_clock

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    clock = process_or_wall_clock(own=arguments.processor_time)
    source = f"measured {datetime.date.today()} on {name}, torch {torch.__version__}"
    calibrate(device, clock, project_root() / "deepspeed_configs", arguments.out, source)


if __name__ == "__main__":
    run_tool(main)
