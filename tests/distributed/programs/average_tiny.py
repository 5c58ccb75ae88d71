"""Train the tiny model with averaged weights, from the start or on from a checkpoint; save before and after.

Arguments: run folder, JSON of `tiny_config`'s arguments, ZeRO stages of decoder and encoders such as 1,3, the
average's decay, number of steps, and the checkpoint to go on from.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

from distributed.tiny import global_batch, micro_batches, rate_of, tiny_config
from metalm.checkpoint.state import RunFacts
from metalm.config import AverageConfig
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.average import average_decay, averaged, update_average
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep


def main() -> None:
    faulthandler.enable()
    folder, arguments, pair, decay, steps, *checkpoint = sys.argv[1:]
    shape, (decoder, encoders) = {"tensor": 1, **json.loads(arguments)}, pair.split(",")
    topology = build_topology(shape["tensor"], open_process_group(find_launch(os.environ), timeout_minutes=3))
    config = tiny_config(
        folder,
        **shape,
        decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
        encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
    )
    average = AverageConfig(decay=float(decay))
    training = config.training.model_copy(update={"average": average})
    config = config.model_copy(update={"training": training})
    engines = build_engines(config, topology)
    store = CheckpointStore(Path(folder), config, topology)
    first = store.load(Path(checkpoint[0]), engines).step if checkpoint else 0
    store.save(engines, first, None, RunFacts())
    step = TrainStep(
        engines, topology, 2, StepGuard(config.guards, config.data.sources, topology.device), SemiCausal()
    )
    losses = []
    for number in range(first, first + int(steps)):
        batches = micro_batches(global_batch(number), config, topology.data_rank, topology.data_size)
        result = step.run(batches, rate_of(number))
        losses.append(float(result.loss_sums.sum() / result.loss_counts.sum()))
        update_average(engines, average_decay(number + 1, average))
        with averaged(engines):
            pass  # what is trained on is not changed by looking at the average
    store.save(engines, first + int(steps), None, RunFacts())
    if topology.rank == 0:
        print("RESULT " + json.dumps({"losses": losses}), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
