"""Generation by the engines themselves, on the ranks of a run: samples to watch, and answers to tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from metalm.config import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.held_out import HeldOutSample, held_out_samples
from metalm.data.row import Row, lay_out
from metalm.data.sources import Source
from metalm.data.tokenizer import Tokenizer
from metalm.document import Document, Part
from metalm.evaluation.beam_search import beam_search
from metalm.evaluation.continued_rows import ContinuedRows
from metalm.objectives import Model
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
    try:
        with torch.no_grad():
            yield
    finally:
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
    """Prompts that are continued, each in one copy or several."""

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
        self._topology, self._copies = topology, copies
        self._rows = ContinuedRows(model, topology, config, tokenizer, prompts)
        wanted = self._rows.whole_length(max(self._rows.lengths) + max_new_tokens)
        self._length = min(wanted, config.data.sequence_length)
        self.rooms = [min(max_new_tokens, self._length - length) for length in self._rows.lengths]
        """New tokens for which each prompt has room."""
        self._last: list[tuple[int, ...]] | None = None

    def next_logits(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [prompts * copies, vocabulary] of what follows each prompt and these tokens of it.

        Args:
            tokens: of each copy; none at first, then those that a copy of the prompt had at the last call,
                and one more. What is said of a copy that has no more is not to be used.
        """
        last, self._last = self._last, [tuple(ids) for ids in tokens]
        if last is None:
            logits = self._rows.read(self._length).repeat_interleave(self._copies, dim=0)
            self._rows.keep([copy // self._copies for copy in range(len(tokens))])
            return logits
        rows, places = [], []
        for copy, ids in enumerate(self._last):
            prompt = copy // self._copies
            copies = range(prompt * self._copies, (prompt + 1) * self._copies)
            goes_on = [one for one in copies if len(ids) > len(last[one]) and last[one] == ids[:-1]]
            rows.append(copy if not goes_on or copy in goes_on else goes_on[0])
            places.append([self._rows.lengths[prompt] + len(ids) - 1])
        self._rows.keep(rows)
        return self._rows.next_logits([ids[-1:] or (0,) for ids in self._last], places)

    def any_goes_on(self, own: bool) -> bool:
        """Whether any data-parallel rank is not done: they gather sharded weights together."""
        going = torch.tensor([int(own)], device=self._topology.device)
        dist.all_reduce(going, op=dist.ReduceOp.MAX, group=self._topology.data_group)
        return bool(going)
