"""CIFAR-10's test photographs, which BIG-bench has as texts of hexadecimal numbers, as yes/no questions.

Every photograph has two questions: one about what it shows, and one about something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from metalm.errors import DataError
from metalm.modalities.image import encode_png
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import place_of, split_by_group


def write_photographs(examples: Sequence[dict[str, Any]], folder: SetFolder) -> None:
    """Write the task `cifar10_yes_no` and its pictures."""
    shown = [max(example["target_scores"], key=example["target_scores"].get) for example in examples]
    kinds = sorted(set(shown))
    phrases = {kind: f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds}
    pictures = {f"photographs/{n:05d}.png": _png(example["input"]) for n, example in enumerate(examples)}
    records = [
        record
        for (name, png), kind in zip(pictures.items(), shown, strict=True)
        for record in yes_no(name, png, phrases[kind], list(phrases.values()))
    ]
    sides = split_by_group(records, lambda record: record["group"])
    folder.write_task("cifar10_yes_no", sides, "label")
    folder.write_zip("images.zip", pictures.items())


def yes_no(name: str, picture: bytes, kind: str, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The two questions about a picture, which is of one of `kinds`; the wrong one is drawn."""
    others = [other for other in kinds if other != kind]
    other = others[int(place_of(f"other {name}") * len(others))]
    group = hashlib.sha256(picture).hexdigest()
    for asked, label in ((kind, "yes"), (other, "no")):
        yield {"image": name, "group": group, "kind": asked, "shown": kind, "label": label}


def _png(text: str) -> bytes:
    try:
        rows = [bytes.fromhex(line.replace("#", "")) for line in text.strip().splitlines()]
        return encode_png(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1, 3))
    except ValueError as error:
        raise DataError(f"a photograph of BIG-bench is not of hexadecimal numbers: {error}") from None
