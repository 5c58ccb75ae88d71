"""Logits of decoders that start from imported ones, through the engines and on any tensor parallelism.

Arguments: output file, JSON {name: pipeline}, JSON [[document, ...], ...] of packed rows. Writes, by name
and row, the logits of the row's tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.reader import CheckpointReader
from metalm.config import load_config
from metalm.data.collate import collate
from metalm.data.row import Row
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology
from metalm.training.engines import build_engines
from metalm.training.weights import adopt
from reference.rows import loss_weights


def main(out: Path, pipelines: dict[str, str], rows: list[list[list[int]]]) -> None:
    launch = find_launch(os.environ)
    device = open_process_group(launch, timeout_minutes=3)
    topology = build_topology(launch.world_size, device)
    results = {}
    for name, pipeline in pipelines.items():
        config = load_config(Path(pipeline), [f"parallel.tensor={launch.world_size}"])
        engines = build_engines(config, topology)
        assert config.initialize.decoder is not None
        reader = CheckpointReader(find_checkpoint(config.initialize.decoder))
        adopt(reader, "decoder", engines, (), topology)
        length = config.data.sequence_length
        batch = collate(
            [_row(documents) for documents in rows],
            model_config=config.model,
            sequence_length=length,
            tp_size=launch.world_size,
            pad_id=0,
        )
        with torch.no_grad():
            logits = engines.decoder(batch, {}, logits_at=torch.arange(len(rows) * length))
        for number, documents in enumerate(rows):
            used = sum(len(document) for document in documents)
            results[f"{name}/{number}"] = logits[number * length : number * length + used].clone()
    if launch.rank == 0:
        save_file(results, out)
        print("RESULT true", flush=True)
    close_topology()


def _row(documents: list[list[int]]) -> Row:
    ends = np.cumsum([len(document) for document in documents]).tolist()
    return Row(np.concatenate(documents).astype(np.int32), loss_weights(ends[-1], ends, []), ends)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
