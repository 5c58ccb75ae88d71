"""ROUGE-1, -2, -L and -Lsum of texts: F1 on stemmed words, the best reference, by the package rouge-score.

Its words are runs of a-z and 0-9: other scripts score 0. For ROUGE-Lsum a sentence is a line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from metalm.tasks.metrics.metric import Answered, mean_of
from metalm.tasks.metrics.optional import optional


def _rouge_score() -> Any:
    return optional("rouge_score.rouge_scorer")


def _f1(kind: str) -> Callable[[Sequence[Answered]], list[float]]:
    def scores(answered: Sequence[Answered]) -> list[float]:
        scorer = _rouge_score().RougeScorer([kind], use_stemmer=True)
        return [
            scorer.score_multi(example.references, example.prediction)[kind].fmeasure for example in answered
        ]

    return scores


ROUGE = [
    mean_of(kind, _f1(kind), require=_rouge_score) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")
]
