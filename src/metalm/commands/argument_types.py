"""What words on a command line mean, as types of argparse."""

from __future__ import annotations

import argparse
import math

LOWEST_TEMPERATURE = 0.001
"""Below, logits that are divided by it overflow."""


def words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError("give one or more, with commas between")
    return words


def counts(text: str) -> tuple[int, ...]:
    if not all(word.isdecimal() for word in words(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers with commas between, such as 0,1,4")
    return tuple(map(int, words(text)))


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def seed(text: str) -> int:
    if natural(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is above {2**32 - 1:,}")
    return natural(text)


def mebibytes(text: str) -> float:
    value = _number(text)
    if not 1 <= value * 2**20 < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of MiB")
    return value


def port(text: str) -> int:
    if natural(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text} is above {2**16 - 1:,}")
    return natural(text)


def temperature(text: str) -> float:
    value = _number(text)
    if value != 0 and not LOWEST_TEMPERATURE <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give 0 for the likeliest tokens, or {LOWEST_TEMPERATURE} or more to sample"
        )
    return value


def readers(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in words(text)]
    if not all(name and encoder for name, _, encoder in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: say who reads what, such as text=E1,image=E2")
    return {name: encoder for name, _, encoder in pairs}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
