"""VQA accuracy, as the owners' evaluation computes it.

An answer is worth min(1, matches among the other people's answers / 3), averaged over leaving out each person
once. Texts are normalised only where the people's answers differ; evaluations that always do give other
numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from metalm.errors import DataError
from metalm.tasks.metrics.metric import Answered, mean_of

_FEWEST_ANSWERS = 4
"""With fewer, no answer at all could reach an accuracy of 1."""

_NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        ["none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
    for word in words.split()
}

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    contraction[:at] + contraction[at + 1 :]: contraction
    for contraction in _CONTRACTED.split()
    for at, sign in enumerate(contraction)
    if sign == "'"
} | {"somebody'd": "somebodyd"}
"""From a contraction that lacks one of its apostrophes; the last is a slip of the owners', kept."""

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def _without_marks(text: str) -> str:
    """A mark becomes a space, or nothing where the text has it beside a space or a number with a comma."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    kept = text
    for mark in _MARKS:
        beside_space = mark + " " in text or " " + mark in text
        kept = kept.replace(mark, "" if beside_space or in_number else " ")
    return _PERIOD.sub("", kept)


def _normalized(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in _without_marks(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _accuracy(example: Answered) -> float:
    answers = [_on_one_line(answer) for answer in example.references]
    prediction = _on_one_line(example.prediction)
    if len(set(answers)) > 1:
        answers = [_normalized(answer) for answer in answers]
        prediction = _normalized(prediction)
    matches = Counter(answers)[prediction]
    with_one_left_out = matches * min(1, (matches - 1) / 3) + (len(answers) - matches) * min(1, matches / 3)
    return with_one_left_out / len(answers)


def _accuracies(answered: Sequence[Answered]) -> list[float]:
    for position, example in enumerate(answered):
        if len(example.references) < _FEWEST_ANSWERS:
            raise DataError(
                f"vqa_accuracy: example {position} has {len(example.references)} answers, expected at least "
                f"{_FEWEST_ANSWERS} (VQA and OK-VQA have ten): give all, doubles too, or use exact_match"
            )
    return [_accuracy(example) for example in answered]


VQA = [mean_of("vqa_accuracy", _accuracies)]
