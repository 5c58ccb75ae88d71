"""Beam search: on a chain of three words whose best paths are known, and beside an exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from metalm.evaluation.beam_search import beam_search

END = 3


def table(seed: int) -> torch.Tensor:
    """Logits [4, 4] of the next word after each."""
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) * 2


def search(logits: torch.Tensor, num_beams: int, penalty: float, most: Sequence[int]) -> list[list[int]]:
    def following(beams: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.stack([logits[beam[-1] if beam else 0] for beam in beams])

    return beam_search(
        following, len(most), num_beams=num_beams, length_penalty=penalty, max_new_tokens=most, end=END
    )


def best_of_all(logits: torch.Tensor, penalty: float, most: int) -> list[int]:
    """The best of all continuations of at most so many words, an end among them, or of exactly so many."""
    log_probabilities = logits.double().log_softmax(-1)

    def score(words: tuple[int, ...]) -> float:
        before = (0, *words[:-1])
        return (
            float(sum(log_probabilities[a, b] for a, b in zip(before, words, strict=True)))
            / len(words) ** penalty
        )

    ended = [(*w, END) for n in range(most) for w in itertools.product(range(END), repeat=n)]
    cut = list(itertools.product(range(END), repeat=most))
    best = max(ended + cut, key=score)
    return list(best[:-1] if best[-1] == END else best)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_enough_beams_find_the_best_of_all(seed: int, penalty: float) -> None:
    logits = table(seed)
    assert search(logits, 27, penalty, [3]) == [best_of_all(logits, penalty, 3)]


def test_a_prompt_is_continued_alike_alone_and_beside_others() -> None:
    logits = table(7)
    assert search(logits, 4, 0.6, [3, 5, 2]) == [search(logits, 4, 0.6, [most])[0] for most in (3, 5, 2)]


def test_no_room_is_no_continuation() -> None:
    assert search(table(1), 2, 1.0, [0]) == [[]]
