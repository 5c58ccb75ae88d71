"""Greedy generation by the engines themselves, to watch a run: no cache, the whole prefix each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from metalm.config import RunConfig
from metalm.data.collate import collate
from metalm.data.corpus import Corpus
from metalm.data.held_out import HeldOutSample, held_out_samples
from metalm.data.row import Row, lay_out
from metalm.data.sources import Source
from metalm.data.tokenizer import Tokenizer
from metalm.document import Document, Part
from metalm.objectives import Model, encode
from metalm.parallel.topology import Topology

GENERATION_BATCH = 32
TEXT_PROMPT_TOKENS = 32


class EvaluatedModel(Model, Protocol):
    """A model whose components can be put into evaluation mode."""

    def by_component(self) -> Mapping[str, Any]:
        """Modules or engines by name."""
        ...


@dataclass(frozen=True)
class Sample:
    """What the model made of one held-out sample."""

    source: str
    modality: str
    """Of `media`."""
    media: Any
    """An image or clip as people look at it, or listen to it: see `Media.decode`."""
    reference: str
    """The caption or the answer, or the text that the prompt begins; of examples of text alone both."""
    generated: str


@contextmanager
def evaluating(model: EvaluatedModel) -> Iterator[None]:
    """Evaluation mode and no gradients within."""
    components = model.by_component().values()
    for component in components:
        component.eval()
    with torch.no_grad():
        yield
    for component in components:
        component.train()


def generate_samples(
    model: EvaluatedModel,
    topology: Topology,
    corpus: Corpus,
    source: Source,
    num_samples: int,
    max_new_tokens: int,
) -> list[Sample]:
    """Captions of the first images or clips of a held-out source, answers of its first examples, or
    continuations of its first texts.

    Collective: all ranks.
    """
    samples = held_out_samples(corpus, source, num_samples)
    asked = [_ask(sample, corpus.tokenizer, max_new_tokens) for sample in samples]
    generated: list[str] = []
    for first in range(0, len(asked), GENERATION_BATCH):
        prompts = [prompt for prompt, _ in asked[first : first + GENERATION_BATCH]]
        tokens = generate_greedily(model, topology, corpus.config, corpus.tokenizer, prompts, max_new_tokens)
        generated += [corpus.tokenizer.decode(ids) for ids in tokens]
    return [
        Sample(source.name, sample.modality, sample.media, reference, text)
        for sample, (_, reference), text in zip(samples, asked, generated, strict=True)
    ]


def _ask(sample: HeldOutSample, tokenizer: Tokenizer, max_new_tokens: int) -> tuple[Row, str]:
    """The prompt of a sample, and what it is held against."""
    document = sample.document
    if sample.num_asked is not None:
        reference = sample.captions[0]
        if sample.media is None:  # nothing else shows what was asked
            reference = f"{_shown(document.parts[: sample.num_asked], tokenizer)}\n\n{reference}"
        return lay_out([document.prompt(sample.num_asked)], tokenizer), reference
    (text,) = document.parts
    prompt = Document((replace(text, tokens=text.tokens[:TEXT_PROMPT_TOKENS]),), ends=False)
    whole = text.tokens[: TEXT_PROMPT_TOKENS + max_new_tokens]
    return lay_out([prompt], tokenizer), tokenizer.decode(whole)


def _shown(parts: Sequence[Part], tokenizer: Tokenizer) -> str:
    return "\n\n".join(text for part in parts if (text := tokenizer.decode(part.tokens)).strip())


def generate_greedily(
    model: EvaluatedModel,
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
    with evaluating(model):
        encoded = encode(model, batch, topology)
        while not bool((finished | (lengths >= longest)).all()) and len(generated) < max_new_tokens:
            last = (lengths - 1).clamp(max=longest - 1)
            logits = model.decoder(batch, encoded, logits_at=row_numbers * longest + last)
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
    missing = length - len(prompt.tokens)
    return replace(
        prompt,
        tokens=np.concatenate((prompt.tokens, np.full(missing, pad_id, prompt.tokens.dtype))),
        loss_weights=np.concatenate((prompt.loss_weights, np.zeros(missing, np.float32))),
        document_ends=[length],
    )


def _until(tokens: list[int], end: int) -> Iterator[int]:
    for token in tokens:
        if token == end:
            return
        yield token
