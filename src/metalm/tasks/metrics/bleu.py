"""BLEU of texts, 0 to 100, by sacrebleu with its defaults: cased, tokenizer 13a, exponential smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from metalm.tasks.metrics.metric import Answered, Metric
from metalm.tasks.metrics.optional import optional

_ORDER = 4


def _sacrebleu() -> Any:
    return optional("sacrebleu")


def _statistics(answered: Sequence[Answered]) -> np.ndarray:
    """Lengths of answer and closest reference, right and all n-grams of the answer: [n, 2 + 2 * 4]."""
    # For one sentence sacrebleu warns unless the order is the sentence's own; the counts are the same.
    bleu = _sacrebleu().BLEU(max_ngram_order=_ORDER, effective_order=True)
    found = [bleu.sentence_score(example.prediction, example.references) for example in answered]
    return np.array([[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in found], np.float64)


def _value(sums: np.ndarray) -> np.ndarray:
    compute = _sacrebleu().BLEU.compute_bleu
    return np.array(
        [
            compute(
                counts[2 : 2 + _ORDER].tolist(),
                counts[2 + _ORDER :].tolist(),
                int(counts[0]),
                int(counts[1]),
                smooth_method="exp",
            ).score
            for counts in sums
        ]
    )


BLEU = [Metric("bleu", _statistics, _value, require=_sacrebleu)]
