"""Exact match: the answer is one of the references, letter for letter."""

from __future__ import annotations

from metalm.tasks.metrics.metric import best_of, mean_of


def _same(prediction: str, reference: str) -> float:
    """White space around either does not count; case does."""
    return float(prediction.strip() == reference.strip())


EXACT = [mean_of(name, best_of(_same)) for name in ("exact_match", "accuracy")]
"""One definition: an accuracy is the exact match of options."""
