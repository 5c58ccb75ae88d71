"""Exact match: the answer is one of the references, letter for letter."""

from __future__ import annotations

import re

from metalm.tasks.metrics.metric import best_of, mean_of

_NEWLINES = re.compile(r"\s*\n\s*")


def _same(prediction: str, reference: str) -> float:
    """White space around either does not count, nor how many newlines stand together; case does.

    A newline of a record is learnt as `</s>`, and generated as a blank line.
    """
    prediction, reference = (_NEWLINES.sub("\n", text.strip()) for text in (prediction, reference))
    return float(prediction == reference)


EXACT = [mean_of(name, best_of(_same)) for name in ("exact_match", "accuracy")]
"""One definition: an accuracy is the exact match of options."""
