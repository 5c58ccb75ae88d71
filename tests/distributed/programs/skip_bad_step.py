"""Two ranks, one of which has a loss that is no number in the second of three steps.

Arguments: output folder, decoder ZeRO stage, encoder ZeRO stage.
"""

import faulthandler
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

from distributed.tiny import global_batch, micro_batches, tiny_config
from metalm.checkpoint.state import RunFacts
from metalm.config import write_config
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep


def main() -> None:
    faulthandler.enable()
    folder, decoder, encoders = sys.argv[1:]
    config = tiny_config(
        folder,
        decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
        encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
    )
    launch = find_launch(os.environ)
    topology = build_topology(1, open_process_group(launch, timeout_minutes=3))
    engines = build_engines(config, topology)
    if launch.rank == 0:
        (Path(folder) / "checkpoints").mkdir()
        write_config(config, Path(folder) / "config.yaml", {})
    store, step = (
        CheckpointStore(Path(folder), config, topology),
        TrainStep(
            engines, topology, 2, StepGuard(config.guards, config.data.sources, topology.device), SemiCausal()
        ),
    )
    skipped, norms = [], []
    for number in range(3):
        batches = micro_batches(global_batch(number), config, topology.data_rank, topology.data_size)
        if number == 1 and topology.data_rank == 1:
            bad = batches[0].loss_weights.clone()
            bad[0, 0] = math.nan
            batches[0] = replace(batches[0], loss_weights=bad)
        result = step.run(batches, 1e-2)
        skipped.append(int(result.skipped_steps))
        norms.append(float(result.norms.joint))
        store.save(engines, number + 1, None, RunFacts())
    print("RESULT " + json.dumps({"rank": launch.rank, "skipped": skipped, "norms": norms}), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
