"""What words on a command line mean, as types of argparse."""

from __future__ import annotations

import argparse


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


def readers(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in words(text)]
    if not all(name and encoder for name, _, encoder in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: say who reads what, such as text=E1,image=E2")
    return {name: encoder for name, _, encoder in pairs}
