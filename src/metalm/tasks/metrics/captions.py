"""COCO's caption metrics on the words of the Penn Treebank: BLEU-1 to -4, CIDEr-D, ROUGE-L."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from metalm.tasks.metrics.metric import Answered, Metric, group_numbers, mean_of
from metalm.tasks.metrics.treebank import caption_words

_ORDER = 4
_TINY, _SMALL = 1e-15, 1e-9
"""What COCO's evaluation adds to counts of right n-grams and of all, so that no set divides by 0."""

_BETA = 1.2
"""Weight of recall in ROUGE-L."""

_SIGMA = 6.0
"""Width of CIDEr-D's penalty on differences in length."""

Ngram = tuple[str, ...]


def _ngrams(words: Sequence[str], order: int = _ORDER) -> Counter[Ngram]:
    return Counter(
        tuple(words[at : at + size]) for size in range(1, order + 1) for at in range(len(words) - size + 1)
    )


def _bleu_statistics(order: int) -> Callable[[Sequence[Answered]], np.ndarray]:
    def of_example(example: Answered) -> list[int]:
        words = caption_words(example.prediction)
        references = [caption_words(reference) for reference in example.references]
        most: Counter[Ngram] = Counter()
        for reference in references:
            most |= _ngrams(reference, order)
        right = [0] * order
        for ngram, count in (_ngrams(words, order) & most).items():
            right[len(ngram) - 1] += count
        closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
        return [len(words), closest, *right, *(max(0, len(words) - size) for size in range(order))]

    return lambda answered: np.array([of_example(example) for example in answered], np.float64)


def _bleu_value(order: int) -> Callable[[np.ndarray], np.ndarray]:
    def value(sums: np.ndarray) -> np.ndarray:
        length, wanted, counts = sums[:, 0], sums[:, 1], sums[:, 2:]
        precisions = (counts[:, :order] + _TINY) / (counts[:, order:] + _SMALL)
        ratio = (length + _TINY) / (wanted + _SMALL)
        brevity = np.exp(1 - 1 / np.minimum(ratio, 1))
        return precisions.prod(axis=1) ** (1 / order) * brevity

    return value


class _WeightedNgrams:
    """N-grams of a caption, each weighted by its count x log(images / images whose references have it)."""

    def __init__(self, ngrams: Counter[Ngram], images_with: Counter[Ngram], num_images: int) -> None:
        self.weights: list[dict[Ngram, float]] = [{} for _ in range(_ORDER)]
        for ngram, count in ngrams.items():
            weight = count * math.log(num_images / max(1, images_with[ngram]))
            self.weights[len(ngram) - 1][ngram] = weight
        self.norms = [math.sqrt(sum(weight**2 for weight in weights.values())) for weights in self.weights]
        self.length = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)

    def similarity(self, reference: _WeightedNgrams) -> float:
        """Mean over n of the clipped cosines, times the penalty on the difference in length."""
        cosines = 0.0
        for given, wanted, norm, wanted_norm in zip(
            self.weights, reference.weights, self.norms, reference.norms, strict=True
        ):
            if norm and wanted_norm:
                shared = given.keys() & wanted.keys()
                product = sum(min(given[ngram], wanted[ngram]) * wanted[ngram] for ngram in shared)
                cosines += product / (norm * wanted_norm)
        return cosines / _ORDER * math.exp(-((self.length - reference.length) ** 2) / (2 * _SIGMA**2))


def _cider_d(answered: Sequence[Answered]) -> list[float]:
    """CIDEr-D of each example (Vedantam et al., arXiv 1411.5726), 0 to 10.

    An image is a group, or an example without one. One image alone scores 0: its n-grams are in every image.
    """
    references = [[_ngrams(caption_words(text)) for text in example.references] for example in answered]
    of_images: dict[int, set[Ngram]] = {}
    for image, captions in zip(
        group_numbers([example.group for example in answered]), references, strict=True
    ):
        of_images.setdefault(image, set()).update(*captions)
    images_with = Counter(ngram for ngrams in of_images.values() for ngram in ngrams)

    def scores() -> Iterator[float]:
        for example, captions in zip(answered, references, strict=True):
            given = _WeightedNgrams(_ngrams(caption_words(example.prediction)), images_with, len(of_images))
            wanted = [_WeightedNgrams(ngrams, images_with, len(of_images)) for ngrams in captions]
            yield 10 * float(np.mean([given.similarity(reference) for reference in wanted]))

    return list(scores())


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = row
        row = [0]
        for at, other in enumerate(second):
            row.append(before[at] + 1 if word == other else max(row[at], before[at + 1]))
    return row[-1]


def _rouge_l(example: Answered) -> float:
    """F of the best precision and the best recall over the references; no words are one empty word."""
    words = caption_words(example.prediction) or [""]
    references = [caption_words(reference) or [""] for reference in example.references]
    common = [_longest_common(words, reference) for reference in references]
    precision = max(common) / len(words)
    recall = max(shared / len(reference) for shared, reference in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


CAPTIONS = [
    *(
        Metric(f"coco_bleu{order}", _bleu_statistics(order), _bleu_value(order))
        for order in range(1, _ORDER + 1)
    ),
    mean_of("cider_d", _cider_d),
    mean_of("caption_rouge_l", lambda answered: [_rouge_l(example) for example in answered]),
]
