"""Beam search over prompts that are continued together.

Sums and ends are those of transformers' beam search, so that a checkpoint and its export say the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

NextLogits = Callable[[Sequence[Sequence[int]]], Tensor]
"""What follows each beam: logits [prompts * beams, vocabulary] for the tokens that each beam has so far."""


class _Beam(NamedTuple):
    total: float
    """Log-likelihood of its tokens."""
    tokens: tuple[int, ...]


@dataclass
class _Search:
    """Of one prompt."""

    num_beams: int
    length_penalty: float
    running: list[_Beam]
    finished: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    """The best ended ones, by their total over their length to the power of the penalty."""
    is_done: bool = False

    def go_on(self, candidates: list[tuple[float, int, int]], end: int) -> None:
        """
        Args:
            candidates: the 2 * num_beams best by total, each with its beam and its next token.
        """
        running: list[_Beam] = []
        for rank, (total, beam, token) in enumerate(candidates):
            tokens = self.running[beam].tokens
            if token == end:
                if rank < self.num_beams:
                    self.finish(total, tokens, len(tokens) + 1)
            elif len(running) < self.num_beams:
                running.append(_Beam(total, (*tokens, token)))
        self.running = running
        length = len(running[0].tokens)
        best = running[0].total / length**self.length_penalty
        self.is_done = len(self.finished) == self.num_beams and self.finished[-1][0] >= best

    def finish(self, total: float, tokens: tuple[int, ...], length: int) -> None:
        """Keep what has ended, if it is among the best."""
        self.finished.append((total / length**self.length_penalty, tokens))
        self.finished.sort(key=lambda one: -one[0])
        del self.finished[self.num_beams :]


def beam_search(
    next_logits: NextLogits,
    num_prompts: int,
    *,
    num_beams: int,
    length_penalty: float,
    max_new_tokens: Sequence[int],
    end: int,
    any_goes_on: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """The best continuation of each prompt, without its end.

    Args:
        next_logits: see above; asked for all prompts as long as one is not done.
        max_new_tokens: of each prompt.
        end: the token that ends a continuation.
        any_goes_on: whether a step is taken, of whether one is needed here.
    """
    searches = [
        _Search(num_beams, length_penalty, [_Beam(0.0, ())] + [_Beam(-1e9, ())] * (num_beams - 1))
        for _ in range(num_prompts)
    ]
    for step in itertools.count():
        for search, most in zip(searches, max_new_tokens, strict=True):
            search.is_done = search.is_done or step >= most
        if not any_goes_on(not all(search.is_done for search in searches)):
            break
        logits = next_logits([beam.tokens for search in searches for beam in search.running])
        log_probabilities = logits.float().log_softmax(dim=-1).view(num_prompts, num_beams, -1)
        totals = torch.tensor([[beam.total for beam in search.running] for search in searches])
        totals = totals.to(log_probabilities.device)[:, :, None] + log_probabilities
        best = totals.flatten(1).topk(2 * num_beams, dim=-1)
        vocabulary = log_probabilities.shape[-1]
        for search, values, places in zip(searches, best.values.tolist(), best.indices.tolist(), strict=True):
            if not search.is_done:
                chosen = [(v, p // vocabulary, p % vocabulary) for v, p in zip(values, places, strict=True)]
                search.go_on(chosen, end)
    for search in searches:
        for beam in search.running:
            if beam.tokens:
                search.finish(beam.total, beam.tokens, len(beam.tokens))
    return [list(search.finished[0][1]) if search.finished else [] for search in searches]
