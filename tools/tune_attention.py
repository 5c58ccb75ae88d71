"""Times candidate block sizes of the Triton attention kernels on this device; prints the lines of its table.

python tools/tune_attention.py --out tuning.json      then put the lines into kernels/triton_configs.py
python tools/tune_attention.py --report               no device: registers and spills of all candidates
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import get_args

HEAD_SIZES = (64, 128)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="compile for 9.0 and tell, without a device")
    parser.add_argument("--head-sizes", type=int, nargs="+", choices=HEAD_SIZES, default=HEAD_SIZES)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    records = report(arguments.head_sizes) if arguments.report else measure(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(records, indent=1) + "\n")


def report(head_sizes: list[int]) -> list[dict[str, object]]:
    """Registers and spills of each candidate, without extras and with bias and dropout."""
    from metalm.kernels.compile_report import compile_ahead
    from metalm.kernels.triton_configs import Kernel
    from metalm.kernels.tuning import candidates

    records = []
    for head_size in head_sizes:
        for has_extras in (False, True):
            for kernel in get_args(Kernel):
                for config in candidates(kernel, head_size, has_extras=has_extras):
                    told = compile_ahead(
                        kernel, head_size, config, has_bias=has_extras, has_dropout=has_extras
                    )
                    print(f"{kernel:15} {head_size:4} {'extras' if has_extras else '':7} {config} {told}")
                    record = {"kernel": kernel, "head_size": head_size, "has_extras": has_extras}
                    records.append({**record, "config": list(config), **dataclasses.asdict(told)})
    return records


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Milliseconds of each candidate, and the best ones as lines of the table."""
    import torch

    from metalm.kernels.benchmark import Case
    from metalm.kernels.tuning import Trial, best, tune

    device = torch.device("cuda", torch.cuda.current_device())
    trials = [
        Trial(head_size, has_extras, arguments.batch_size, 2048 // head_size, arguments.length)
        for head_size in arguments.head_sizes
        for has_extras in (False, True)
    ]
    masks = {
        kind: Case(kind, arguments.length, 8, 1, 1, 64).mask(device)
        for kind in ("causal", "semi-causal packed")
    }
    records = []
    for record in tune(device, trials, masks, num_processes=arguments.processes):
        print(json.dumps(record), flush=True)
        records.append(record)
        if arguments.out:
            arguments.out.write_text(json.dumps(records, indent=1) + "\n")
    print(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    for variant, config in best(records).items():
        print(f"    {variant!r}: {config!r},")
    return records


if __name__ == "__main__":
    main()
