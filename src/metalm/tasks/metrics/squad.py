"""SQuAD's exact match and F1, as the second version's evaluation defines them, with questions without answer.

Also the metric of closed-book questions (TriviaQA, Natural Questions, WebQuestions): best over all aliases.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from metalm.tasks.metrics.metric import Answered, mean_of

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
"""Takes out ASCII's punctuation marks, and no others."""


def normalized(text: str) -> str:
    """In lower case, without punctuation and articles, words parted by one space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def _best(score: Callable[[str, str], float]) -> Callable[[Sequence[Answered]], list[float]]:
    """Scores of examples by `score` of normalised texts.

    A reference that normalises to nothing says that there is no answer; it counts only where all are so.
    """

    def scores(answered: Sequence[Answered]) -> list[float]:
        found = []
        for example in answered:
            references = [kept for text in example.references if (kept := normalized(text))] or [""]
            found.append(max(score(normalized(example.prediction), reference) for reference in references))
        return found

    return scores


def _same(prediction: str, reference: str) -> float:
    return float(prediction == reference)


def _f1(prediction: str, reference: str) -> float:
    """F1 of the bags of words; 1 for two empty ones, 0 where one is empty."""
    given, wanted = prediction.split(), reference.split()
    if not given or not wanted:
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))


SQUAD = [mean_of("squad_em", _best(_same)), mean_of("squad_f1", _best(_f1))]
