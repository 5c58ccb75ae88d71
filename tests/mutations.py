"""Damage by seed: bytes and values that a reader of what comes from outside must not trip over."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

WORDS = (
    b"-1",
    b"1e999",
    b"null",
    b"[[[[",
    b'"../"',
    b"9" * 30,
    b"NaN",
    b"\xff",
    b"\0",
    b"\\ud800",
    b"\n",
    b"&a *a",
)
"""What means something to one parser or another."""
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**63, 10**40, 1e308, float("nan"), float("inf"), "", "x", "../x", "/", "a\0b"),
    *("\ud800", "x" * 5000, [], {}, [[]], {"": None}, [1, "a"], {"a": {"b": [1]}}),
)
"""What a place in a document may hold instead of what belongs there."""


def mutate_bytes(content: bytes, chance: random.Random, words: Sequence[bytes] = WORDS) -> bytes:
    """The content with a few bytes flipped, cut, doubled or exchanged for words that mean something."""
    changed = bytearray(content)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[place : place + chance.randrange(1, 40)]
        elif kind == 2:
            changed[place:place] = changed[place : place + chance.randrange(1, 40)]
        elif kind == 3:
            changed[place : place + chance.randrange(3)] = chance.choice(words)
        else:
            del changed[place:]
    return bytes(changed)


def mutate_value(content: Any, chance: random.Random) -> Any:
    """A document of mappings and lists in which one place, anywhere, holds something else or is gone."""
    changed = copy.deepcopy(content)
    places = list(_places(changed))
    holder, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1:
        other_holder, other_key = chance.choice(places)
        holder[key] = copy.deepcopy(other_holder[other_key])
    else:
        holder[key] = copy.deepcopy(chance.choice(VALUES))
    return changed


def _places(content: Any) -> Any:
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])
