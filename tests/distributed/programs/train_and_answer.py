"""Train a small model for three steps, save it, and write the engines' own logits of every prompt.

Arguments: output folder, folder of the tokenizer, kind of the model, tensor-parallel size, ZeRO stages of
decoder and encoders.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from conversion.cases import PROMPTS, prompt_row, run_config
from metalm.checkpoint.state import Progress, RunFacts
from metalm.config import write_config
from metalm.config.schema import DeepSpeedConfig, ParallelConfig
from metalm.data.collate import collate
from metalm.data.row import Row
from metalm.data.tokenizer import load_tokenizer
from metalm.evaluation.generation import evaluating
from metalm.objectives import encode
from metalm.objectives.semi_causal import SemiCausal
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import build_engines
from metalm.training.guards import StepGuard
from metalm.training.step import TrainStep

RATES = (3e-3, 3e-3, 3e-3)
MICRO_BATCH_SIZE = 2


def main() -> None:
    faulthandler.enable()
    folder, tokenizer_folder = Path(sys.argv[1]), Path(sys.argv[2])
    kind, tensor, decoder_stage, encoders_stage = sys.argv[3], int(sys.argv[4]), sys.argv[5], sys.argv[6]
    launch = find_launch(os.environ)
    topology = build_topology(tensor, open_process_group(launch, timeout_minutes=3))
    config = run_config(kind, tokenizer_folder)
    stages = DeepSpeedConfig(
        decoder=f"deepspeed_configs/decoder_zero{decoder_stage}.json",
        encoders=f"deepspeed_configs/encoders_zero{encoders_stage}.json",
    )
    training = config.training.model_copy(
        update={"micro_batch_size": MICRO_BATCH_SIZE, "global_batch_size": 8, "precision": "fp32"}
    )
    config = config.model_copy(
        update={"parallel": ParallelConfig(tensor=tensor), "deepspeed": stages, "training": training}
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    prompts = [prompt_row(parts, tokenizer, config) for parts in PROMPTS.values()]

    def batch_of(rows: list[Row]):
        return collate(
            rows,
            model_config=config.model,
            sequence_length=config.data.sequence_length,
            tp_size=tensor,
            pad_id=tokenizer.pad_id,
        )

    if launch.rank == 0:
        (folder / "checkpoints").mkdir(parents=True)
        write_config(config, folder / "config.yaml", {})
    engines = build_engines(config, topology)
    step = TrainStep(
        engines,
        topology,
        len(config.data.sources),
        StepGuard(config.guards, config.data.sources, topology.device),
        SemiCausal(),
    )
    rows = [*prompts, prompts[0]]
    own = rows[topology.data_rank :: topology.data_size]
    batches = [batch_of(own[n : n + MICRO_BATCH_SIZE]) for n in range(0, len(own), MICRO_BATCH_SIZE)]
    losses = []
    for rate in RATES:
        result = step.run(batches, rate)
        losses.append(float(result.loss_sums.sum() / result.loss_counts.sum()))
    facts = RunFacts(progress=Progress(trained_tokens=100.0))
    CheckpointStore(folder, config, topology).save(engines, len(RATES), None, facts)
    logits = {}
    with evaluating(engines):
        for name, prompt in zip(PROMPTS, prompts, strict=True):
            batch = batch_of([prompt])
            encoded = encode(engines, batch, topology)
            answer = engines.decoder(batch, encoded, logits_at=torch.arange(len(prompt.tokens)))
            logits[name] = answer.contiguous()
    if launch.rank == 0:
        save_file(logits, folder / "logits.safetensors")
        print("RESULT " + json.dumps({"losses": losses}), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
