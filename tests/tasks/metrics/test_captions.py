"""COCO's caption metrics.

The expected numbers were made once by pycocoevalcap 1.2 (its Java tokenizer, Bleu, Cider, Rouge).
"""

from __future__ import annotations

import math

import pytest

from metalm.tasks.metrics import METRICS, Answered

CAPTIONS = [
    Answered(
        "A man riding a wave on a surfboard.",
        (
            "A man on a surfboard riding a wave.",
            "The surfer rides a big wave in the ocean.",
            "a person riding a wave",
        ),
    ),
    Answered(
        "Two dogs play with a ball in the grass",
        (
            "Two dogs are playing with a red ball.",
            "A couple of dogs on grass",
            "Two dogs playing in the grass with a ball in the sun",
        ),
    ),
    Answered("a plate of food", ("A plate of pasta, broccoli and bread sits on a table.",)),
    Answered(
        "A red bus parked on the street next to a red bus",
        ("A double-decker bus (red) on a street.", "A red bus drives down the street next to cars."),
    ),
    Answered("the the the the", ("The cat is on the mat.", "There is a cat on the mat.")),
    Answered("", ("A woman holding an umbrella.", "a woman's umbrella")),
    Answered(
        "A black-and-white cat isn't sitting on the keyboard!",
        (
            "A cat sitting on a laptop's keyboard.",
            "A black-and-white cat is sitting on the keyboard of a computer",
            "cat on keyboard",
        ),
    ),
    Answered("un café à Paris", ("Un café à Paris, la nuit", "a café in Paris")),
]
BLEU = [0.7016269775574036, 0.60661659999932, 0.515020305438132, 0.3919794737291242]
CIDER_D = [
    2.742098425569437,
    2.6881763617429284,
    1.1683331131522454,
    2.0175232014573745,
    0.22012288629690083,
    0.0,
    2.6003476754822157,
    4.238669172052021,
]
ROUGE_L = [
    0.7176470588235294,
    0.6797198344476282,
    0.3689516129032258,
    0.646969696969697,
    0.3860759493670886,
    0.0,
    0.9512670565302144,
    0.7721518987341772,
]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu(order: int) -> None:
    assert METRICS[f"coco_bleu{order}"].score(CAPTIONS) == pytest.approx(BLEU[order - 1], abs=1e-9)


def test_cider_d() -> None:
    assert METRICS["cider_d"].per_example(CAPTIONS) == pytest.approx(CIDER_D, abs=1e-9)
    assert METRICS["cider_d"].score(CAPTIONS) == pytest.approx(1.9594088544691404, abs=1e-9)


def test_rouge_l() -> None:
    assert METRICS["caption_rouge_l"].per_example(CAPTIONS) == pytest.approx(ROUGE_L, abs=1e-9)
    assert METRICS["caption_rouge_l"].score(CAPTIONS) == pytest.approx(0.5653478884719451, abs=1e-9)


def test_cider_d_of_a_caption_that_is_its_reference_is_ten_beside_another_image() -> None:
    answered = [Answered("a red bus stops", ("a red bus stops",)), Answered("", ("two dogs",))]
    assert METRICS["cider_d"].per_example(answered) == pytest.approx([10, 0])


def test_cider_d_counts_an_image_once_however_often_it_is_answered() -> None:
    bus, dogs = ("a red bus stops",), ("two dogs run",)
    once = [Answered("a bus stops", bus, "1"), Answered("two cats", dogs, "2")]
    scores = METRICS["cider_d"].per_example(once)
    twice = METRICS["cider_d"].per_example([*once, Answered("a bus stops", bus, "1")])
    assert scores[0] > 0
    assert twice == pytest.approx([*scores, scores[0]])


def test_one_image_alone_has_no_cider_d() -> None:
    assert METRICS["cider_d"].score([Answered("a red bus", ("a red bus",))]) == 0


def test_captions_without_words_are_scored() -> None:
    answered = [Answered("", ("a dog",)), Answered("...", ("a cat",))]
    for name in ("coco_bleu1", "coco_bleu4", "cider_d", "caption_rouge_l"):
        assert METRICS[name].score(answered) == 0
    assert math.isfinite(METRICS["coco_bleu4"].score([Answered("", ("",))]))
