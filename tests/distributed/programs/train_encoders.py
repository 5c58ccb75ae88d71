"""Train a variant of the encoders under every ZeRO pair, save it at steps 0, 2 and the last.

Arguments: variant, tensor size, micro-batch size, output folder, checkpoint to start from (or `new`),
pairs such as 1,3 2,1 (decoder, encoders).
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

from distributed.encoder_variants import variant_batch, variant_config
from distributed.tiny import RATES, STEPS, micro_batches
from metalm.checkpoint.state import RunFacts
from metalm.config import write_config
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep

SAVED_STEPS = (0, 2, STEPS)


def main() -> None:
    faulthandler.enable()
    variant, tensor, micro_batch_size, folder, start, *pairs = sys.argv[1:]
    launch = find_launch(os.environ)
    topology = build_topology(int(tensor), open_process_group(launch, timeout_minutes=3))
    for pair in pairs:
        decoder, encoders = pair.split(",")
        config = variant_config(
            variant,
            folder,
            tensor=int(tensor),
            micro_batch_size=int(micro_batch_size),
            decoder=f"deepspeed_configs/decoder_zero{decoder}.json",
            encoders=f"deepspeed_configs/encoders_zero{encoders}.json",
        )
        run_folder = Path(folder) / f"zero_{decoder}_{encoders}"
        if launch.rank == 0:
            (run_folder / "checkpoints").mkdir(parents=True)
            write_config(config, run_folder / "config.yaml", {})
        engines = build_engines(config, topology)
        store = CheckpointStore(run_folder, config, topology)
        first = 0 if start == "new" else store.load(Path(start), engines).step
        step = TrainStep(
            engines, topology, 2, StepGuard(config.guards, config.data.sources, topology.device), SemiCausal()
        )
        losses = []
        for number in range(first, STEPS + 1):
            if number in SAVED_STEPS:
                store.save(engines, number, None, RunFacts())
            if number == STEPS:
                break
            rows = variant_batch(number)
            batches = micro_batches(rows, config, topology.data_rank, topology.data_size)
            result = step.run(batches, RATES[number])
            losses.append(float(result.loss_sums.sum() / result.loss_counts.sum()))
        if launch.rank == 0:
            print("RESULT " + json.dumps({"zero": pair, "losses": losses}), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
