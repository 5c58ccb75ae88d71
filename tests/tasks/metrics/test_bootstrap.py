"""Standard errors, and what no metric is defined on."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu

from metalm.errors import ConfigError, DataError
from metalm.tasks.metrics import METRICS, Answered, Score, measure

WORDS = ["a", "red", "bus", "stops", "near", "the", "dog", "runs", "on", "green", "grass"]


def _captions(count: int) -> list[Answered]:
    """Captions of which about a third of the words are wrong."""
    generator = np.random.default_rng(1)
    answered = []
    for _ in range(count):
        words = generator.choice(WORDS, size=8)
        guessed = np.where(generator.random(8) < 1 / 3, generator.choice(WORDS, size=8), words)
        answered.append(Answered(" ".join(guessed), (" ".join(words),)))
    return answered


def _labels(count: int) -> list[Answered]:
    """Three labels, of which about a third are wrong."""
    generator = np.random.default_rng(2)
    true = generator.choice(["yes", "no", "maybe"], size=count)
    guessed = np.where(
        generator.random(count) < 1 / 2, generator.choice(["yes", "no", "maybe"], size=count), true
    )
    return [Answered(given, (wanted,)) for given, wanted in zip(guessed, true, strict=True)]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("exact_match", _labels),
        ("macro_f1", _labels),
        ("matthews", _labels),
        ("coco_bleu4", _captions),
        ("bleu", _captions),
        ("cider_d", _captions),
        ("squad_f1", _captions),
    ],
)
def test_errors_shrink_as_the_root_of_the_number_of_examples(
    name: str, make: Callable[[int], list[Answered]]
) -> None:
    few, many = measure(name, make(100)), measure(name, make(1600))
    assert few.standard_error / many.standard_error == pytest.approx(4, rel=0.25)


def test_the_error_of_an_accuracy_is_that_of_a_proportion() -> None:
    answered = [Answered("yes", ("yes",))] * 300 + [Answered("no", ("yes",))] * 100
    score = measure("accuracy", answered)
    assert score.value == 0.75
    assert score.count == 400
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 400), rel=0.08)


def test_a_resample_of_a_corpus_metric_is_scored_as_a_set_of_its_own() -> None:
    answered = _captions(30)
    generator = np.random.default_rng(5)
    scores = []
    for _ in range(50):
        drawn = [answered[at] for at in generator.integers(30, size=30)]
        references = [[example.references[0] for example in drawn]]
        scores.append(sacrebleu.corpus_bleu([example.prediction for example in drawn], references).score)
    assert measure("bleu", answered, resamples=50, seed=5).standard_error == pytest.approx(
        np.std(scores, ddof=1)
    )


def test_the_seed_decides_the_error() -> None:
    answered = _captions(50)
    assert measure("coco_bleu2", answered, seed=3) == measure("coco_bleu2", answered, seed=3)
    assert measure("coco_bleu2", answered, seed=3) != measure("coco_bleu2", answered, seed=4)


def test_groups_are_drawn_whole() -> None:
    alone = _labels(100)
    grouped = [example._replace(group=str(at)) for at, example in enumerate(alone)]
    thrice = measure("accuracy", grouped * 3)
    assert thrice.standard_error == pytest.approx(measure("accuracy", alone).standard_error, rel=1e-9)
    assert thrice.count == 300
    assert thrice.standard_error > 1.5 * measure("accuracy", alone * 3).standard_error


@pytest.mark.parametrize("answered", [[Answered("a", ("a",))], [Answered("a", ("a",), "1")] * 2])
def test_one_example_or_group_leaves_the_error_unknown(answered: list[Answered]) -> None:
    score = measure("exact_match", answered)
    assert score.value == 1
    assert math.isnan(score.standard_error)


def test_examples_that_all_score_alike_have_no_error() -> None:
    assert measure("squad_f1", [Answered("a dog", ("dog",))] * 20) == Score(1.0, 0.0, 20)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_no_metric_takes_nothing_or_an_example_without_references(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} of no examples"):
        measure(name, [])
    with pytest.raises(DataError, match=f"{name}: example 1 .answered 'b'. has no reference"):
        measure(name, [Answered("a", ("a",)), Answered("b", ())])


def test_an_unknown_metric_is_refused_with_the_names_of_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="no metric 'rouge'; the metrics are accuracy, bleu, .*vqa_accuracy"
    ):
        measure("rouge", [Answered("a", ("a",))])


def test_what_is_there_is_required_in_silence() -> None:
    for name in METRICS.keys() - {"meteor", "spice"}:
        METRICS[name].require()


def test_importing_the_metrics_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "scipy", "sklearn", "nltk", "sacrebleu", "rouge_score", "pandas"]
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, metalm.tasks.metrics; print([m for m in {heavy} if m in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"
