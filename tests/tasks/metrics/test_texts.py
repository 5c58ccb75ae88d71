"""ROUGE and BLEU of texts, by their packages.

The numbers of ROUGE were made once by rouge-score 0.1.2, for each reference by itself; BLEU is compared to
sacrebleu's own score of the set.
"""

from __future__ import annotations

import sys

import pytest
import sacrebleu

from metalm.errors import ConfigError
from metalm.tasks.metrics import METRICS, Answered, measure

ANSWERED = [
    Answered(
        "They slept.\nThe cats were running home.",
        ("A cat runs home.", "The cats ran home.\nThen they slept."),
    ),
    Answered("Alice buys 3 red apples in the market", ("Alice bought three apples at the market.",)),
    Answered("the dog", ("the dog", "a dog sleeps")),
    Answered("", ("an answer",)),
    Answered("Ein Caf\u00e9 in K\u00f6ln", ("ein Caf\u00e9 in Bonn",)),
]
ROUGE = {
    "rouge1": [0.7142857142857143, 0.5333333333333333, 1.0, 0.0, 0.6666666666666665],
    "rouge2": [0.3333333333333333, 0.15384615384615383, 1.0, 0.0, 0.5714285714285715],
    "rougeL": [0.5454545454545454, 0.5333333333333333, 1.0, 0.0, 0.6666666666666665],
    "rougeLsum": [0.7142857142857143, 0.5333333333333333, 1.0, 0.0, 0.6666666666666665],
}


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_that_of_the_best_reference(name: str) -> None:
    assert METRICS[name].per_example(ANSWERED) == pytest.approx(ROUGE[name], abs=1e-6)


def test_bleu_is_sacrebleus_of_the_set() -> None:
    answered = ANSWERED * 2 + [
        Answered("a man rides a bike down the hill", ("a man rides a bike down a hill",))
    ]
    streams = [
        [example.references[at] if at < len(example.references) else None for example in answered]
        for at in range(2)
    ]
    expected = sacrebleu.corpus_bleu([example.prediction for example in answered], streams).score
    assert expected > 1
    assert METRICS["bleu"].score(answered) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("prediction", ["", "x"])
def test_bleu_without_a_right_word_is_zero(prediction: str) -> None:
    assert METRICS["bleu"].score([Answered(prediction, ("a dog",))]) == 0


@pytest.mark.parametrize(
    ("name", "package"), [("bleu", "sacrebleu"), ("rougeL", "rouge_score"), ("drop_f1", "scipy")]
)
def test_a_missing_package_is_one_message(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}.*pip install 'metalm\[tasks\]'"):
        measure(name, ANSWERED)
    with pytest.raises(ConfigError, match=f"needs the package {package}"):
        METRICS[name].require()
