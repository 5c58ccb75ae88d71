"""Train the tiny model for five steps under every ZeRO pair, each from the same start, and save it.

Arguments: output folder, JSON of `tiny_config`'s arguments, the number of steps and the kind of rows, ZeRO
stages as pairs such as 1,3 2,1 (decoder, encoders).
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

from distributed.tiny import STEPS, global_batch, micro_batches, rate_of, tiny_config
from metalm.checkpoint.state import RunFacts
from metalm.config import write_config
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.drift import find_drift
from metalm.training.engines import Engines, build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep


def watch_first_layer(engines: Engines) -> list[int]:
    """Comes to hold the positions that this rank's first decoder layer gets, call by call."""
    seen: list[int] = []
    layer = engines.decoder.module.gpt.decoder.layers[0]
    layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[0]))
    return seen


def main() -> None:
    faulthandler.enable()
    folder, arguments, *pairs = sys.argv[1:]
    shape = {"tensor": 1, **json.loads(arguments)}
    steps, kind = shape.pop("steps", STEPS), shape.pop("rows", "random")
    launch = find_launch(os.environ)
    device = open_process_group(launch, timeout_minutes=3)
    topology = build_topology(shape["tensor"], device)
    for pair in pairs:
        decoder, encoders = pair.split(",")
        config = tiny_config(
            folder,
            **shape,
            decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
            encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
        )
        run_folder = Path(folder) / f"zero_{decoder}_{encoders}"
        if launch.rank == 0:
            (run_folder / "checkpoints").mkdir(parents=True)
            write_config(config, run_folder / "config.yaml", {})
        engines = build_engines(config, topology)
        store = CheckpointStore(run_folder, config, topology)
        store.save(engines, 0, None, RunFacts())
        step = TrainStep(
            engines, topology, 2, StepGuard(config.guards, config.data.sources, topology.device), SemiCausal()
        )
        losses, norms = [], []
        seen = watch_first_layer(engines)
        for number in range(steps):
            rows = global_batch(number, kind)
            batches = micro_batches(rows, config, topology.data_rank, topology.data_size)
            result = step.run(batches, rate_of(number))
            losses.append(float(result.loss_sums.sum() / result.loss_counts.sum()))
            norms.append(float(result.norms.joint))
        store.save(engines, steps, None, RunFacts())
        answer = {
            "zero": pair,
            "losses": losses,
            "norms": norms,
            "drift": find_drift(engines, topology),
            "layer_positions": seen[0],
            "optimizer_is_offloaded": engines.decoder.zero_use_cpu_optimizer(),
        }
        if launch.rank == 0:
            print("RESULT " + json.dumps(answer), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
