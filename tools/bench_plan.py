"""A plan's step times beside those that two ranks on this machine take, layout by layout.

python tools/calibrate.py cpu.json --beside 2 --threads 1 --processor-time
python tools/bench_plan.py cpu.json --out plan.json

Steps of the layouts of one tensor-parallel size take turns. Beside a calibration in the processor's time,
read the processor's seconds of the busiest rank, whoever else uses the machine. The ranks measure their
links themselves.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from metalm.cli import ToolParser, run_tool
from metalm.config import RunConfig
from metalm.planning.calibration import overlay
from metalm.planning.devices import find_device
from metalm.planning.plan import plan_run
from metalm.planning.shipped_calibration import shipped_calibration
from metalm.project_files import project_root

RANKS, ROUNDS = 2, 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2, ZeRO 1, 1": {"tensor": 2},
    "TP 2, micro-batches of 4, recomputed": {"tensor": 2, "micro": 4, "recompute": True},
    "DP 2, ZeRO 1, 1": {},
    "DP 2, micro-batches of 2, ZeRO 2, 2": {"micro": 2, "stages": (2, 2)},
    "DP 2, ZeRO 1, 3": {"stages": (1, 3)},
}


def config_of(tensor: int = 1, micro: int = 1, recompute: bool = False, stages: Any = (1, 1)) -> RunConfig:
    """Decoder of 4 x 384 and a text encoder of 2 x 256 over rows of 256 positions, 8 a step."""
    jsons = project_root() / "deepspeed_configs"
    decoder = {"num_layers": 4, "hidden_size": 384, "num_heads": 6, "recompute": recompute}
    text = {"num_layers": 2, "hidden_size": 256, "num_heads": 4, "max_text_positions": 64}
    return RunConfig.model_validate(
        {
            "run": {"name": "bench_plan"},
            "parallel": {"tensor": tensor},
            "deepspeed": {
                "decoder": jsons / f"decoder_zero{stages[0]}.json",
                "encoders": jsons / f"encoders_zero{stages[1]}.json",
            },
            "model": {"vocab_size": 2048, "decoder": decoder, "encoders": {"text": text}},
            "data": {
                "tokenizer": "unused",
                "sequence_length": 256,
                "lanes": 8,
                "spans": {"fraction": 0.25, "min_length": 31, "max_length": 32},
                "sources": {"text": {"path": "unused", "readers": {"text": "text"}}},
            },
            "training": {
                "steps": 100,
                "global_batch_size": 8,
                "micro_batch_size": micro,
                "precision": "fp32",
                "schedule": {"warmup_steps": 1},
            },
        }
    )


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path, help="of tools/calibrate.py")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--tensor", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.tensor:
        run_rank(arguments.tensor)
        return 0
    calibration = overlay(shipped_calibration(find_device("cpu")), arguments.calibration)
    records = []
    for tensor in (2, 1):
        found = start_ranks(arguments, tensor)
        keys = ("latency_s", "seconds_per_byte")
        links = [statistics.mean(rank["links"][key] for rank in found) for key in keys]
        path = Path(f"{arguments.calibration}.links")
        link = {"ranks": RANKS, "spans_nodes": False, "latency_s": links[0], "bytes_per_s": 1 / links[1]}
        figure = {"value": 1.0, "low": 0.9, "high": 1.1}
        path.write_text(json.dumps({"links": [link], "figures": {"links inside nodes": figure}}))
        known = overlay(calibration, path)
        path.unlink()
        for name, layout in LAYOUTS.items():
            if layout.get("tensor", 1) != tensor:
                continue
            plan = plan_run(config_of(**layout), RANKS, find_device("cpu"), known)
            of_ranks = [rank["layouts"][name] for rank in found]
            record: dict[str, Any] = {"layout": name, "predicted_s": plan.step_s, "link": link}
            record |= {"processor_s": max(one["processor_s"] for one in of_ranks)}
            record |= {"wall_s": max(one["wall_s"] for one in of_ranks), "parts_s": plan.parts_s}
            records.append(record)
            ratios = [record["predicted_s"] / record[key] - 1 for key in ("processor_s", "wall_s")]
            print(
                f"{name:<40} predicted {plan.step_s:6.3f} s ({plan.range_s[0]:.3f} to "
                f"{plan.range_s[1]:.3f})   processor {record['processor_s']:6.3f} s "
                f"({ratios[0]:+.0%})   wall {record['wall_s']:6.3f} s ({ratios[1]:+.0%})",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(records, indent=1))
    return 0


def start_ranks(arguments: argparse.Namespace, tensor: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(arguments.calibration), "--tensor", str(tensor)]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    lines = [next(line for line in text.splitlines() if line.startswith("RESULT")) for text in outputs]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def run_rank(tensor: int) -> None:
    import torch

    from metalm.objectives import build_objective
    from metalm.parallel.launch import find_launch, open_process_group
    from metalm.parallel.topology import build_topology, close_topology
    from metalm.training.engines import build_engines
    from metalm.training.guards import StepGuard
    from metalm.training.step import TrainStep
    from metalm.training.step_benchmark import made_up_batches

    torch.set_num_threads(1)
    topology = build_topology(tensor, open_process_group(find_launch(os.environ), 3))
    runs = {}
    for name, layout in LAYOUTS.items():
        if layout.get("tensor", 1) == tensor:
            config = config_of(**layout)
            engines = build_engines(config, topology)
            guard = StepGuard(config.guards, config.data.sources, topology.device)
            step = TrainStep(engines, topology, 1, guard, build_objective(config))
            batches = made_up_batches(
                config, one_document=True, data_size=topology.data_size, tensor_size=tensor
            )
            runs[name] = (step, batches)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(ROUNDS + 1):
        for name, (step, batches) in runs.items():
            torch.distributed.barrier()
            began = time.process_time(), time.perf_counter()
            step.run(batches, 1e-5)
            spent = time.process_time() - began[0], time.perf_counter() - began[1]
            if number:
                times[name].append(spent)
    layouts = {
        name: {
            "processor_s": statistics.median(one for one, _ in spent),
            "wall_s": statistics.median(wall for _, wall in spent),
        }
        for name, spent in times.items()
    }
    print("RESULT " + json.dumps({"links": measure_links(), "layouts": layouts}), flush=True)
    close_topology()


def measure_links() -> dict[str, float]:
    """Processor seconds of an all-reduce: what it takes at least, and per byte sent."""
    import torch

    few, many = torch.ones(1 << 8), torch.ones(1 << 19)
    spent: dict[int, list[float]] = {few.numel(): [], many.numel(): []}
    for number in range(60):
        for value in (few, many):
            torch.distributed.barrier()
            began = time.process_time()
            torch.distributed.all_reduce(value)
            if number >= 10:
                spent[value.numel()].append(time.process_time() - began)
    least, most = (statistics.median(times) for times in spent.values())
    sent = 4 * (many.numel() - few.numel()) * 2 * (RANKS - 1) / RANKS
    return {"latency_s": least, "seconds_per_byte": max(most - least, 1e-9) / sent}


if __name__ == "__main__":
    run_tool(main)
