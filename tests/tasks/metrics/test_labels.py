"""Macro-F1 and Matthews' correlation are scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from metalm.errors import DataError
from metalm.tasks.metrics import METRICS, Answered


@pytest.mark.parametrize("num_labels", [2, 3, 7])
def test_scores_are_those_of_scikit_learn(num_labels: int) -> None:
    generator = np.random.default_rng(num_labels)
    labels = [f"label {number}" for number in range(num_labels)]
    true = labels + list(generator.choice(labels, size=60))
    predicted = [wanted if generator.random() < 0.6 else generator.choice(labels) for wanted in true]
    answered = [Answered(given, (wanted,)) for given, wanted in zip(predicted, true, strict=True)]
    assert METRICS["macro_f1"].score(answered) == pytest.approx(f1_score(true, predicted, average="macro"))
    assert METRICS["matthews"].score(answered) == pytest.approx(matthews_corrcoef(true, predicted))


def test_a_text_that_is_no_label_is_wrong_and_no_label_of_its_own() -> None:
    true, predicted = ["a", "a", "b", "b"], ["a", "what?", "b", "who?"]
    answered = [Answered(given, (wanted,)) for given, wanted in zip(predicted, true, strict=True)]
    expected = f1_score(true, predicted, labels=["a", "b"], average="macro")
    assert METRICS["macro_f1"].score(answered) == pytest.approx(expected)
    as_one = ["a", "other", "b", "other"]
    assert METRICS["matthews"].score(answered) == pytest.approx(matthews_corrcoef(true, as_one))


def test_one_label_throughout_correlates_with_nothing() -> None:
    assert METRICS["matthews"].score([Answered("a", ("a",)), Answered("b", ("a",))]) == 0
    assert METRICS["matthews"].score([Answered("a", ("a",))] * 3) == 0


def test_several_references_are_refused() -> None:
    with pytest.raises(DataError, match="example 1 has 2 references .'a', 'b'., expected one label"):
        METRICS["macro_f1"].score([Answered("a", ("a",)), Answered("a", ("a", "b"))])
