"""ROUGE-1, -2, -L and -Lsum of texts: F1 on stemmed words, the best reference, by the package rouge-score.

Its words are runs of a-z and 0-9: other scripts score 0. For ROUGE-Lsum a sentence is a line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metalm.tasks.metrics.metric import Answered, mean_of
from metalm.tasks.metrics.optional import optional


def _f1(kind: str) -> Callable[[Sequence[Answered]], list[float]]:
    def scores(answered: Sequence[Answered]) -> list[float]:
        scorer = optional("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=True)
        return [
            scorer.score_multi(example.references, example.prediction)[kind].fmeasure for example in answered
        ]

    return scores


ROUGE = [mean_of(kind, _f1(kind)) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")]
