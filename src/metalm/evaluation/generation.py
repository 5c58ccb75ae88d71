"""Greedy generation by the engines themselves, to watch a run: no cache, the whole prefix each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from metalm.config import RunConfig
from metalm.data.collate import collate
from metalm.data.corpus import Corpus
from metalm.data.held_out import HeldOutSample, held_out_samples
from metalm.data.row import Row, lay_out
from metalm.data.sources import Source
from metalm.data.tokenizer import Tokenizer
from metalm.document import Document, Part
from metalm.evaluation.beam_search import beam_search
from metalm.objectives import Model, encode
from metalm.parallel.topology import Topology
from metalm.progress import Phase

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
    asked: str = ""
    """The text of an example before its last answer."""


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
    parts = (model, topology, corpus.config, corpus.tokenizer)
    with Phase(f"generating for {source.name}", len(asked), "samples") as phase:
        for first in range(0, len(asked), GENERATION_BATCH):
            prompts = [prompt for prompt, _, _ in asked[first : first + GENERATION_BATCH]]
            tokens = generate_greedily(*parts, prompts, max_new_tokens)
            generated += [corpus.tokenizer.decode(ids) for ids in tokens]
            phase.advance(len(prompts))
    return [
        Sample(source.name, sample.modality, sample.media, reference, text, question)
        for sample, (_, question, reference), text in zip(samples, asked, generated, strict=True)
    ]


def _ask(sample: HeldOutSample, tokenizer: Tokenizer, max_new_tokens: int) -> tuple[Row, str, str]:
    """The prompt of a sample, its text beside an image or clip, and what the answer is held against."""
    document = sample.document
    if sample.num_asked is not None:
        asked, reference = _shown(document.parts[: sample.num_asked], tokenizer), sample.captions[0]
        if sample.media is None:  # nothing else shows what was asked
            reference = f"{asked}\n\n{reference}"
        return lay_out([document.prompt(sample.num_asked)], tokenizer), asked, reference
    (text,) = document.parts
    prompt = Document((replace(text, tokens=text.tokens[:TEXT_PROMPT_TOKENS]),), ends=False)
    whole = text.tokens[: TEXT_PROMPT_TOKENS + max_new_tokens]
    return lay_out([prompt], tokenizer), "", tokenizer.decode(whole)


def _shown(parts: Sequence[Part], tokenizer: Tokenizer) -> str:
    return "\n\n".join(text for part in parts if (text := tokenizer.decode(part.tokens).strip()))


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
        prompts: open rows of one document each, as many on all ranks; each data-parallel rank has its own.

    Collective: all ranks.
    """
    with evaluating(model):
        started = _Started(model, topology, config, tokenizer, prompts, 1, max_new_tokens)
        tokens: list[list[int]] = [[] for _ in prompts]
        finished = [room == 0 for room in started.rooms]
        while started.any_goes_on(not all(finished)):
            chosen = started.next_logits(tokens).argmax(dim=-1).tolist()
            for number, token in enumerate(chosen):
                if not finished[number] and token != tokenizer.document_id:
                    tokens[number].append(token)
                finished[number] |= (
                    token == tokenizer.document_id or len(tokens[number]) == started.rooms[number]
                )
    return tokens


def generate_by_beams(
    model: EvaluatedModel,
    topology: Topology,
    config: RunConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Row],
    max_new_tokens: int,
    *,
    num_beams: int,
    length_penalty: float,
) -> list[list[int]]:
    """Continue each prompt by beam search, up to and without `</d>`; see `generate_greedily`.

    Collective: all ranks.
    """
    with evaluating(model):
        started = _Started(model, topology, config, tokenizer, prompts, num_beams, max_new_tokens)
        return beam_search(
            started.next_logits,
            len(prompts),
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_new_tokens=started.rooms,
            end=tokenizer.document_id,
            any_goes_on=started.any_goes_on,
        )


class _Started:
    """Prompts in a batch with room behind them, encoded once."""

    def __init__(
        self,
        model: EvaluatedModel,
        topology: Topology,
        config: RunConfig,
        tokenizer: Tokenizer,
        prompts: Sequence[Row],
        copies: int,
        max_new_tokens: int,
    ) -> None:
        self._model, self._topology = model, topology
        multiple = config.parallel.length_multiple
        wanted = -(-(max(len(p.tokens) for p in prompts) + max_new_tokens) // multiple) * multiple
        self._longest = min(wanted, config.data.sequence_length)
        self.rooms = [min(max_new_tokens, self._longest - len(p.tokens)) for p in prompts]
        """New tokens for which each prompt has room."""
        self._starts = [len(p.tokens) for p in prompts for _ in range(copies)]
        self._batch = collate(
            [_with_room(p, self._longest, tokenizer.pad_id) for p in prompts for _ in range(copies)],
            model_config=config.model,
            sequence_length=self._longest,
            tp_size=topology.tensor_size,
            pad_id=tokenizer.pad_id,
            cp_size=topology.context_size,
        ).to(topology.device)
        self._encoded = encode(model, self._batch, topology)

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [prompts * copies, vocabulary] of what follows each prompt and these tokens of it."""
        places = []
        for row, (start, following) in enumerate(zip(self._starts, tokens, strict=True)):
            end = start + len(following)
            self._batch.tokens[row, start:end] = torch.tensor(following, dtype=self._batch.tokens.dtype)
            places.append(row * self._longest + end - 1)
        at = torch.tensor(places, device=self._topology.device)
        logits: torch.Tensor = self._model.decoder(self._batch, self._encoded, logits_at=at)
        return logits

    def any_goes_on(self, own: bool) -> bool:
        """Whether any data-parallel rank is not done: they gather sharded weights together."""
        going = torch.tensor([int(own)], device=self._topology.device)
        dist.all_reduce(going, op=dist.ReduceOp.MAX, group=self._topology.data_group)
        return bool(going)


def _with_room(prompt: Row, length: int, pad_id: int) -> Row:
    """The prompt with padding inside its document, to be written over."""
    missing = length - len(prompt.tokens)
    return replace(
        prompt,
        tokens=np.concatenate((prompt.tokens, np.full(missing, pad_id, prompt.tokens.dtype))),
        loss_weights=np.concatenate((prompt.loss_weights, np.zeros(missing, np.float32))),
        document_ends=[length],
    )
