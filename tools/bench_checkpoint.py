"""Time saving and loading a checkpoint beside plain safetensors files of the same bytes.

Example: torchrun --nproc-per-node 2 tools/bench_checkpoint.py --tensor 2 --json checkpoint.json
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from metalm.checkpoint.folders import prune_checkpoints
from metalm.checkpoint.names import step_folder
from metalm.checkpoint.state import RunFacts
from metalm.cli import ToolParser, run_tool
from metalm.config import RunConfig, write_config
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import Topology, build_topology, close_topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import build_engines
from metalm.training.saving import HostBuffers


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers of 768 (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="medians are shown (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    launch = find_launch(os.environ)
    topology = build_topology(options.tensor, open_process_group(launch, timeout_minutes=30))
    told: list[Any] = [tempfile.mkdtemp(dir=options.folder) if launch.rank == 0 else None]
    dist.broadcast_object_list(told)
    try:
        figures = _measure(Path(told[0]), topology, options.layers, options.repetitions)
    finally:
        dist.barrier()
        if launch.rank == 0:
            shutil.rmtree(told[0])
    if launch.rank == 0:
        for name, value in figures.items():
            print(f"{name:<44}{value:>14,.3f}")
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
    close_topology()


def _measure(folder: Path, topology: Topology, num_layers: int, repetitions: int) -> dict[str, float]:
    config = _config(folder, topology.tensor_size, num_layers)
    engines = build_engines(config, topology)
    if topology.rank == 0:
        (folder / "checkpoints").mkdir()
        write_config(config, folder / "config.yaml", {})
    store = CheckpointStore(folder, config, topology)
    plain = {
        name: HostBuffers().snapshot(engine, name, topology).tensors
        for name, engine in engines.by_component().items()
    }
    own_bytes = sum(tensor.nbytes for tensors in plain.values() for tensor in tensors.values())
    times: dict[str, list[float]] = {}
    for step in range(2 * repetitions + 2):  # the first of each kind makes buffers and is not counted
        background = step % 2 == 1
        _remove_older(folder, topology)
        plain_first = step // 2 % 2 == 0  # whoever comes second finds less memory for the disk's cache
        for is_plain in (plain_first, not plain_first):
            began = _meet()
            if is_plain:
                _save_plainly(plain, folder / f"plain_{topology.rank}")
                plain_s = _meet() - began
            else:
                store.save(engines, step, None, RunFacts(), background=background)
                returned_s = _meet() - began
                store.finish()
                saved_s = _meet() - began
        if step > 1:
            times.setdefault("plain", []).append(plain_s)
            times.setdefault("saved_background" if background else "saved", []).append(saved_s)
            if background:
                times.setdefault("blocked", []).append(returned_s)
    newest = step_folder(folder / "checkpoints", 2 * repetitions + 1)
    began = _meet()
    store.load(newest, engines)
    loaded_s = _meet() - began
    median = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "ranks": topology.world_size,
        "parameters, millions": sum(
            p.numel() * (topology.tensor_size if getattr(p, "tensor_model_parallel", False) else 1)
            for p in engines.decoder.module.parameters()
        )
        / 1e6,
        "MiB written by rank 0": own_bytes / 2**20,
        "plain safetensors and fsync, s": median["plain"],
        "save, s": median["saved"],
        "save over plain": median["saved"] / median["plain"],
        "save over plain, the best of each": min(times["saved"]) / min(times["plain"]),
        "save in the background until published, s": median["saved_background"],
        "of that the training is blocked, s": median["blocked"],
        "blocked share": median["blocked"] / median["saved_background"],
        "load, s": loaded_s,
    }


def _remove_older(folder: Path, topology: Topology) -> None:
    """All files are new ones; freeing old ones is in nobody's time."""
    shutil.rmtree(folder / f"plain_{topology.rank}", ignore_errors=True)
    if topology.rank == 0:
        prune_checkpoints(folder / "checkpoints", keep_last=1, keep_every_steps=None)


def _save_plainly(components: dict[str, dict[str, Any]], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for component, tensors in components.items():
        path = folder / f"{component}.safetensors"
        save_file(tensors, path)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _meet() -> float:
    dist.barrier()
    return time.perf_counter()


def _config(folder: Path, tensor: int, num_layers: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": folder.name, "folder": folder.parent},
            "parallel": {"tensor": tensor},
            "model": {
                "vocab_size": 20_000,
                "decoder": {"num_layers": num_layers, "hidden_size": 768, "num_heads": 12},
            },
            "data": {"tokenizer": "none", "sequence_length": 128, "sources": {}},
            "training": {
                "steps": 1,
                "global_batch_size": 64,
                "micro_batch_size": 1,
                "precision": "fp32",
            },
            "checkpoint": {"keep_last": 1000},
        }
    )


if __name__ == "__main__":
    run_tool(main)
