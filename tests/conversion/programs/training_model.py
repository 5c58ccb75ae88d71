"""The model as it trains, Megatron and all: its parameters, its logits and its greedy continuations.

Arguments: kind of the model, folder of the tokenizer, output file. Alone in a process, because Megatron
keeps its groups in globals.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from conversion.cases import NEW_TOKENS, PROMPTS, prompt_row, run_config
from metalm.data.collate import collate
from metalm.data.row import Row
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.encoder import EncoderBank, encoder_draw
from metalm.model.initialization import initialize_parameters
from metalm.parallel.launch import find_launch, open_process_group
from metalm.parallel.topology import build_topology, close_topology


def main(kind: str, tokenizer_folder: Path, out: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    config = run_config(kind, tokenizer_folder)
    topology = build_topology(1, open_process_group(find_launch(os.environ), timeout_minutes=2))
    decoder = Decoder(config.model, config.data.sequence_length, topology)
    encoders = EncoderBank(config.model)
    initialize_parameters(decoder, "decoder", 1, lambda name: decoder_draw(config.model.decoder, name), 0, 1)
    initialize_parameters(encoders, "encoders", 1, lambda name: encoder_draw(config.model, name), 0, 1)
    draw = torch.Generator().manual_seed(3)
    gated = config.model.decoder.activation == "swiglu"
    results: dict[str, Tensor] = {}
    for component, module in (("decoder", decoder), ("encoders", encoders)):
        for name, parameter in module.named_parameters():
            with torch.no_grad():  # so that biases and norms matter, and that greedy text is no one word
                small = parameter.dim() == 1 or any(
                    part in name for part in ("embed", "output_layer", "lora")
                )
                product = gated and "linear_fc1" in name  # two of its outputs are multiplied
                scale = 0.1 if small else 0.2 if product or component == "encoders" else 0.4
                parameter += scale * torch.randn(parameter.shape, generator=draw)
            results[f"parameter/{component}/{name}"] = parameter.detach().clone()

    @torch.no_grad()
    def logits(row: Row) -> Tensor:
        length = len(row.tokens)
        batch = collate(
            [row], model_config=config.model, sequence_length=length, tp_size=1, pad_id=tokenizer.pad_id
        )
        encoded = encoders({name: spans.shares[0] for name, spans in batch.encoders.items()})
        return decoder(batch, encoded, logits_at=torch.arange(length))

    for name, parts in PROMPTS.items():
        row = prompt_row(parts, tokenizer, config)
        results[f"logits/{name}"] = logits(row).contiguous()
        results[f"greedy/{name}"] = greedy(row, logits, tokenizer)
    save_file(results, out)
    close_topology()


def greedy(row: Row, logits, tokenizer: Tokenizer) -> Tensor:
    """The most likely token, one step after the other, each on the whole prefix; ends after </d>."""
    tokens: list[int] = []
    while len(tokens) < NEW_TOKENS and tokenizer.document_id not in tokens:
        tokens.append(int(logits(row)[-1].argmax()))
        row = replace(
            row,
            tokens=np.append(row.tokens, np.int32(tokens[-1])),
            loss_weights=np.append(row.loss_weights, np.float32(0)),
            document_ends=[len(row.tokens) + 1],
        )
    return torch.tensor(tokens)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
