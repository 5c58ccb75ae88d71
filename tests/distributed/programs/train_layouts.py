"""Train the tiny model on one layout of the ranks after another, and save what each makes of it.

Arguments: output folder, and for each layout JSON of `tiny_config`'s arguments with `name`, `zero` (stages of
decoder and encoders, such as 1,3), `steps` and, to go on from an earlier layout's last step, `resume`: its
name.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from distributed.tiny import global_batch, micro_batches, rate_of, tiny_config
from metalm.checkpoint.names import list_checkpoints
from metalm.checkpoint.state import RunFacts
from metalm.config import write_config
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.drift import find_drift
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep


def main() -> None:
    faulthandler.enable()
    folder, *layouts = sys.argv[1:]
    device = open_process_group(find_launch(os.environ), timeout_minutes=3)
    for layout in layouts:
        parallel_state.destroy_model_parallel()
        train(Path(folder), device, **json.loads(layout))
    close_topology()


def train(
    folder: Path,
    device: torch.device,
    *,
    name: str,
    zero: str,
    steps: int,
    resume: str | None = None,
    **shape: Any,
) -> None:
    decoder, encoders = zero.split(",")
    config = tiny_config(
        str(folder),
        **shape,
        decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
        encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
    )
    topology = build_topology(config.parallel.tensor, device, context_size=config.parallel.context)
    if topology.rank == 0:
        (folder / name / "checkpoints").mkdir(parents=True)
        write_config(config, folder / name / "config.yaml", {})
    engines = build_engines(config, topology)
    store, first = CheckpointStore(folder / name, config, topology), 0
    if resume is None:
        store.save(engines, 0, None, RunFacts())
    else:
        first = store.load(list_checkpoints(folder / resume / "checkpoints")[-1], engines).step
    step = TrainStep(
        engines, topology, 2, StepGuard(config.guards, config.data.sources, device), SemiCausal()
    )
    losses = []
    for number in range(first, first + steps):
        batches = micro_batches(global_batch(number), config, topology.data_rank, topology.data_size)
        result = step.run(batches, rate_of(number))
        losses.append(float(result.loss_sums.sum() / result.loss_counts.sum()))
    store.save(engines, first + steps, None, RunFacts())
    drift = find_drift(engines, topology)
    if topology.rank == 0:
        print("RESULT " + json.dumps({"name": name, "losses": losses, "drift": drift}), flush=True)


if __name__ == "__main__":
    main()
