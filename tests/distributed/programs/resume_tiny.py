"""Train the tiny model on from checkpoints of other layouts.

Arguments: output folder, JSON of `tiny_config`'s arguments, number of steps, and for each resume
`CHECKPOINT:D,E` with the ZeRO stages of decoder and encoders to go on with.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

from distributed.tiny import global_batch, micro_batches, rate_of, tiny_config
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep


def main() -> None:
    faulthandler.enable()
    folder, arguments, steps, *resumes = sys.argv[1:]
    shape = {"tensor": 1, **json.loads(arguments)}
    launch = find_launch(os.environ)
    topology = build_topology(shape["tensor"], open_process_group(launch, timeout_minutes=3))
    for resume in resumes:
        checkpoint, zero = resume.rsplit(":", 1)
        decoder, encoders = zero.split(",")
        config = tiny_config(
            folder,
            **shape,
            decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
            encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
        )
        engines = build_engines(config, topology)
        state = CheckpointStore(Path(folder), config, topology).load(Path(checkpoint), engines)
        step = TrainStep(
            engines, topology, 2, StepGuard(config.guards, config.data.sources, topology.device), SemiCausal()
        )
        losses = []
        for number in range(state.step, state.step + int(steps)):
            batches = micro_batches(global_batch(number), config, topology.data_rank, topology.data_size)
            result = step.run(batches, rate_of(number))
            losses.append(float(result.loss_sums.sum() / result.loss_counts.sum()))
        if launch.rank == 0:
            print("RESULT " + json.dumps({"resume": resume, "losses": losses}), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
