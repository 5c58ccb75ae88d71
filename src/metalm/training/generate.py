"""Greedy generation by the engines themselves, to watch a run: no cache, the whole prefix each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from metalm.config import RunConfig
from metalm.data.collate import collate
from metalm.data.rows import Row
from metalm.data.tokenizer import Tokenizer
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines
from metalm.training.objective import encode


@contextmanager
def evaluating(engines: Engines) -> Iterator[None]:
    """Evaluation mode and no gradients within."""
    components = engines.by_component().values()
    for engine in components:
        engine.eval()
    with torch.no_grad():
        yield
    for engine in components:
        engine.train()


def generate_greedily(
    engines: Engines,
    topology: Topology,
    config: RunConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Row],
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue each prompt with its most likely tokens, up to and without `</d>`.

    Args:
        prompts: open rows of one document each, the same on all ranks.

    Collective: all ranks.
    """
    multiple = topology.tensor_size if config.parallel.sequence_parallel else 1
    wanted = -(-(max(len(p.tokens) for p in prompts) + max_new_tokens) // multiple) * multiple
    longest = min(wanted, config.data.sequence_length)
    rows = [_with_room(prompt, longest, tokenizer.pad_id) for prompt in prompts]
    batch = collate(
        rows,
        model_config=config.model,
        sequence_length=longest,
        tp_size=topology.tensor_size,
        pad_id=tokenizer.pad_id,
    ).to(topology.device)
    row_numbers = torch.arange(len(prompts), device=topology.device)
    lengths = torch.tensor([len(p.tokens) for p in prompts], device=topology.device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=topology.device)
    generated: list[torch.Tensor] = []
    with evaluating(engines):
        encoded = encode(engines, batch, topology)
        while not bool((finished | (lengths >= longest)).all()) and len(generated) < max_new_tokens:
            last = (lengths - 1).clamp(max=longest - 1)
            logits = engines.decoder(batch, encoded, logits_at=row_numbers * longest + last)
            token = logits.argmax(dim=-1)
            token = torch.where(lengths >= longest, tokenizer.document_id, token)
            finished = finished | (token == tokenizer.document_id)
            generated.append(torch.where(finished, tokenizer.document_id, token))
            batch.tokens[row_numbers, lengths.clamp(max=longest - 1)] = generated[-1]
            lengths = lengths + 1
    columns = torch.stack(generated, dim=1).tolist() if generated else [[] for _ in prompts]
    return [list(_until(column, tokenizer.document_id)) for column in columns]


def _with_room(prompt: Row, length: int, pad_id: int) -> Row:
    """The prompt with padding inside its document, to be written over."""
    room = np.full(length - len(prompt.tokens), pad_id, prompt.tokens.dtype)
    return replace(prompt, tokens=np.concatenate((prompt.tokens, room)), document_ends=[length])


def _until(tokens: list[int], end: int) -> Iterator[int]:
    for token in tokens:
        if token == end:
            return
        yield token
