"""Train the tiny model, some of it frozen, under every ZeRO pair, and save it at the start and the end.

Arguments: output folder, JSON of tensor size, micro-batch size, steps and changes of the config, where to
start (`new`, `resume:CHECKPOINT` or `weights:CHECKPOINT`), ZeRO pairs such as 1,3 2,1 (decoder, encoders).
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

from distributed.finetuned import changed_config
from distributed.tiny import global_batch, micro_batches, rate_of
from metalm.checkpoint.reader import CheckpointReader
from metalm.checkpoint.state import RunFacts
from metalm.config import write_config
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.drift import find_drift
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.start import Start, load_start
from metalm.training.step import TrainStep


def start_from(words: str) -> Start:
    kind, _, path = words.partition(":")
    if kind == "new":
        return Start()
    reader = CheckpointReader(Path(path))
    if kind == "resume":
        return Start(checkpoint=reader)
    return Start(initial={component: CheckpointReader(Path(path)) for component in reader.components()})


def main() -> None:
    faulthandler.enable()
    folder, arguments, start_words, *pairs = sys.argv[1:]
    shape = json.loads(arguments)
    launch = find_launch(os.environ)
    topology = build_topology(shape["tensor"], open_process_group(launch, timeout_minutes=3))
    for pair in pairs:
        config = changed_config(folder, shape, pair)
        run_folder = Path(folder) / f"zero_{pair.replace(',', '_')}"
        if launch.rank == 0:
            (run_folder / "checkpoints").mkdir(parents=True)
            write_config(config, run_folder / "config.yaml", {})
        start = start_from(start_words)
        engines = build_engines(config, topology, start.given)
        state = load_start(start, config, topology, engines)
        first = 0 if state is None else state.step
        store = CheckpointStore(run_folder, config, topology)
        store.save(engines, first, None, RunFacts())
        step = TrainStep(
            engines, topology, 2, StepGuard(config.guards, ["one", "other"], topology.device), SemiCausal()
        )
        losses = []
        for number in range(first, first + shape["steps"]):
            batches = micro_batches(global_batch(number), config, topology.data_rank, topology.data_size)
            result = step.run(batches, rate_of(number))
            losses.append(float(result.loss_sums.sum() / result.loss_counts.sum()))
        store.save(engines, first + shape["steps"], None, RunFacts())
        optimized = {
            name: sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
            for name, engine in engines.trained().items()
        }
        gradients = {
            name: [n for n, p in engine.module.named_parameters() if p.requires_grad or p.grad is not None]
            for name, engine in engines.by_component().items()
        }
        answer = {
            "zero": pair,
            "losses": losses,
            "optimized": optimized,
            "may_have_gradients": gradients,
            "drift": find_drift(engines, topology),
        }
        if launch.rank == 0:
            print("RESULT " + json.dumps(answer), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
