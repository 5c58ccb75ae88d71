"""Metrics of short answers: exact match, SQuAD, DROP, VQA.

The expected numbers were made once by the owners' programs: evaluate-v2.0.py of SQuAD 2.0, drop.py of
allennlp-models (each answer split at " | " into the list of spans that it takes), and vqaEval.py of VQA.
"""

from __future__ import annotations

import pytest

from metalm.errors import DataError
from metalm.tasks.metrics import METRICS, Answered, measure

# ruff: noqa: RUF001
SQUAD = [
    ("the Eiffel Tower", ("Eiffel tower",), 1, 1.0),
    ("Eiffel", ("The Eiffel Tower", "tower of Eiffel"), 0, 0.6666666666666666),
    ("", ("",), 1, 1.0),
    ("", ("Paris",), 0, 0.0),
    ("Paris", ("",), 0, 0.0),
    ("The", ("the", "Paris"), 0, 0.0),
    ("a", ("an",), 1, 1.0),
    ("U.S. Army!", ("US army", "the army"), 1, 1.0),
    ("dogs dogs cats", ("dogs cats cats",), 0, 0.6666666666666666),
    ("well-known", ("well known", "wellknown"), 1, 1.0),
    ("don’t", ("don't",), 0, 0.0),
    ("café über", ("CAFÉ",), 0, 0.6666666666666666),
    ("1,000 men", ("1000",), 0, 0.6666666666666666),
    ("no answer at all", ("yes", "no", "an answer"), 0, 0.4),
]
DROP = [
    ("3", ("3",), 1.0, 1.0),
    ("3.0", ("3",), 1.0, 1.0),
    ("three", ("3",), 0.0, 0.0),
    ("3 yards", ("3-yard",), 0.0, 0.5),
    ("4 yards", ("3 yards",), 0.0, 0.0),
    ("Tom Brady", ("Tom Brady | Randy Moss",), 0.0, 0.5),
    ("Randy Moss | Tom Brady", ("Tom Brady | Randy Moss",), 1.0, 1.0),
    ("Brady | Moss | Welker", ("Tom Brady | Randy Moss",), 0.0, 0.44),
    ("Tom Brady and Randy Moss", ("Tom Brady | Randy Moss", "Moss"), 0.0, 0.33),
    ("the 1,500 soldiers", ("1500", "1500 soldiers"), 1.0, 1.0),
    ("", ("yes",), 0.0, 0.0),
    ("yes", ("", "no"), 0.0, 0.0),
    ("", ("",), 0.0, 0.0),
    ("The French", ("French | The French",), 0.0, 0.5),
    ("a b c d | c d", ("c d e | a b", "c d f g h | x | a b q"), 0.0, 0.65),
    ("4 July 1990", ("July 4, 1990",), 0.0, 1.0),
    ("5% | $6", ("5 | 6",), 1.0, 1.0),
    ("München", ("münchen | Köln",), 0.0, 0.5),
    ("red red blue", ("blue red",), 0.0, 1.0),
    ("7", ("7 | 7",), 0.0, 0.5),
]
VQA = [
    ("yes", ["yes"] * 10, 1.0),
    ("Yes", ["yes"] * 10, 0.0),
    ("Yes", ["yes"] * 9 + ["no"], 1.0),
    ("yes.", ["yes"] * 3 + ["no"] * 7, 0.9),
    ("no", ["yes"] * 3 + ["no"] * 7, 1.0),
    ("2", ["two"] * 2 + ["2"] * 1 + ["three"] * 7, 0.9),
    ("a dog", ["dog"] * 3 + ["the dog"] * 1 + ["cat"] * 6, 1.0),
    ("cant", ["can't"] * 2 + ["cant"] * 2 + ["no"] * 6, 1.0),
    ("black-and-white", ["black and white"] * 4 + ["white"] * 6, 1.0),
    ("black - white", ["black white"] * 1 + ["black  white"] * 1 + ["grey"] * 8, 0.6),
    ("1,000", ["1000"] * 2 + ["1,000"] * 1 + ["many"] * 7, 0.9),
    ("", ["none"] * 9 + ["nothing"], 0.0),
    ("none", ["0"] * 3 + ["zero"] * 3 + ["no"] * 4, 1.0),
    ("St. John's", ["st john's"] * 5 + ["church"] * 5, 1.0),
    ("3.5", ["3.5"] * 4 + ["3 5"] * 6, 1.0),
    ("don't know\n", ["dont know"] * 2 + ["don't  know"] * 2 + ["x"] * 6, 1.0),
    ("left, right", ["left right"] * 5 + ["right"] * 5, 1.0),
    ("somebody'd", ["somebodyd"] * 5 + ["x"] * 5, 1.0),
    ("café", ["Café"] * 2 + ["cafe"] * 8, 0.6),
    ("race", ["race"] * 4 + ["racing"], 1.0),
    ("dog", ["dog"] * 2 + ["cat"] * 2 + ["bird"], 0.533333333333),
    ("dog?", ["dog"] * 2 + ["dog!"] * 1 + ["?"] * 7, 0.9),
]


@pytest.mark.parametrize(("prediction", "references", "em", "f1"), SQUAD)
def test_squad(prediction: str, references: tuple[str, ...], em: float, f1: float) -> None:
    answered = [Answered(prediction, references)]
    assert METRICS["squad_em"].score(answered) == em
    assert METRICS["squad_f1"].score(answered) == pytest.approx(f1, abs=1e-9)


@pytest.mark.parametrize(("prediction", "references", "em", "f1"), DROP)
def test_drop(prediction: str, references: tuple[str, ...], em: float, f1: float) -> None:
    answered = [Answered(prediction, references)]
    assert METRICS["drop_em"].score(answered) == em
    assert METRICS["drop_f1"].score(answered) == pytest.approx(f1, abs=1e-9)


@pytest.mark.parametrize(("prediction", "answers", "accuracy"), VQA)
def test_vqa(prediction: str, answers: list[str], accuracy: float) -> None:
    answered = [Answered(prediction, tuple(answers))]
    assert METRICS["vqa_accuracy"].score(answered) == pytest.approx(accuracy, abs=1e-9)


def test_vqa_refuses_so_few_answers_that_none_could_be_right() -> None:
    with pytest.raises(DataError, match="vqa_accuracy: example 1 has 3 answers, expected at least 4"):
        measure("vqa_accuracy", [Answered("cat", ("cat",) * 10), Answered("cat", ("cat",) * 3)])


@pytest.mark.parametrize("name", ["exact_match", "accuracy"])
def test_exact_match_minds_case_but_not_white_space_around(name: str) -> None:
    answered = [
        Answered(" yes\n", ("no", "yes ")),
        Answered("Yes", ("yes",)),
        Answered("", ("",)),
        Answered("caf\u00e9", ("cafe\u0301",)),
        Answered("first\n\nthen second", ("first\nthen second",)),
        Answered("first then second", ("first\nthen second",)),
    ]
    assert METRICS[name].per_example(answered).tolist() == [1, 0, 1, 0, 1, 0]


def test_a_set_scores_the_mean_of_its_examples() -> None:
    answered = [Answered(prediction, references) for prediction, references, _, _ in SQUAD]
    mean = sum(f1 for _, _, _, f1 in SQUAD) / len(SQUAD)
    assert measure("squad_f1", answered).value == pytest.approx(mean, abs=1e-9)
    assert measure("squad_f1", answered).count == len(SQUAD)
