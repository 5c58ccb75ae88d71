"""Times interval attention beside SDPA and FlexAttention; prints a table and writes JSON.

python tools/bench_attention.py --lengths 2048 --threads 2 --out attention.json
"""

import argparse
import datetime
import json
import platform
from pathlib import Path

import torch

from metalm.kernels.benchmark import MASK_KINDS, PEERS, Case, matmul_tflops, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**power for power in range(9, 16)])
    parser.add_argument("--masks", nargs="+", choices=MASK_KINDS, default=MASK_KINDS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--documents", type=int, default=8, help="documents packed in a row")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16 if on_gpu else 8)
    parser.add_argument("--head-size", type=int, default=128 if on_gpu else 64)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--max-dense-length", type=int, default=8192, help="longest length for dense SDPA")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    limit = matmul_tflops(device, dtype)
    print(f"{device}, {dtype}: one large matrix product runs at {limit:.3g} TFLOP/s")
    print(
        f"{'mask':20} {'length':>6} {'pass':20} {'peer':18} {'ms':>10} {'TFLOP/s':>8} {'/ours':>7} {'MiB':>8}"
    )
    results = []
    for length in arguments.lengths:
        for kind in arguments.masks:
            case = Case(
                kind, length, arguments.documents, arguments.batch_size, arguments.heads, arguments.head_size
            )
            for backward in (False, True):
                records = measure(
                    case,
                    device=device,
                    dtype=dtype,
                    backward=backward,
                    peers=tuple(arguments.peers),
                    repetitions=arguments.repetitions,
                    max_dense_length=arguments.max_dense_length,
                )
                for record in records:
                    print_record(record)
                results += records
    if arguments.out:
        run = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "matmul_tflops": limit,
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "results": results,
        }
        arguments.out.write_text(json.dumps(run, indent=1) + "\n")


def print_record(record: dict[str, object]) -> None:
    line = f"{record['mask']:20} {record['length']:6} {record['pass']:20} {record['peer']:18}"
    if "not_run" in record:
        print(f"{line} not run: {record['not_run']}")
        return
    memory = "-" if record["peak_mib"] is None else f"{record['peak_mib']:.1f}"
    ratio = f"{record['times_ours']:.2f}" if "times_ours" in record else "-"
    print(f"{line} {record['ms']:10.2f} {record['tflops']:8.3f} {ratio:>7} {memory:>8}", flush=True)


if __name__ == "__main__":
    main()
