"""How well a generated caption names the colours and shapes of a demo scene."""

from __future__ import annotations

from collections.abc import Sequence

from metalm.data.demo.scenes import COLOURS, SHAPES


def attribute_accuracy(predicted_captions: Sequence[str], reference_captions: Sequence[str]) -> float:
    """The share of colour words and shape words that are right, in 0..1.

    Objects are compared one by one in the order of mention; both attributes of a missing or an extra
    object count as wrong.

    Raises:
        ValueError: there is no caption, or the two sequences differ in length.
    """
    right = compared = 0
    for predicted, reference in zip(predicted_captions, reference_captions, strict=True):
        found, expected = _attributes(predicted), _attributes(reference)
        compared += max(len(found), len(expected))
        right += sum(one == other for one, other in zip(found, expected, strict=False) if one is not None)
    if compared == 0:
        raise ValueError("attribute_accuracy needs at least one caption that names an object")
    return right / compared


def _attributes(caption: str) -> list[str | None]:
    """Colour and shape of each object in turn, None where a caption leaves one out."""
    found: list[str | None] = []
    for word in caption.lower().replace(",", " ").replace(".", " ").split():
        expects_colour = len(found) % 2 == 0
        if word in COLOURS:
            found += [word] if expects_colour else [None, word]
        elif word in SHAPES:
            found += [None, word] if expects_colour else [word]
    if len(found) % 2:
        found.append(None)
    return found
