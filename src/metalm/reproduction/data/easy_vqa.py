"""easy-VQA: questions about a drawing of one coloured shape, with the owner's split.

The owner has no validation split: it is taken from the training pictures, all questions about one together.
Training pictures that are the same as one of the test are left out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from metalm.errors import DataError
from metalm.reproduction.data.archives import read_members
from metalm.reproduction.data.packages import EASY_VQA
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import owners_split

PACKAGES = (EASY_VQA,)
DATA = "easy_vqa/data/"


def write(files: dict[str, Path], folder: SetFolder) -> None:
    """Write the task and its pictures."""
    found = dict(
        read_members(
            files[EASY_VQA.name],
            lambda name: name.startswith(DATA) and name.endswith((".png", "/questions.json")),
        )
    )
    pictures = {
        name.removeprefix(DATA).replace("/images/", "/"): content
        for name, content in sorted(found.items())
        if name.endswith(".png")
    }
    seen = {name: hashlib.sha256(content).hexdigest() for name, content in pictures.items()}
    train, test = (_records(found, owner, seen) for owner in ("train", "test"))
    folder.write_task("easy_vqa", owners_split(train, test), label="answer")
    folder.write_zip("images.zip", pictures.items())


def _records(found: dict[str, bytes], owner: str, seen: dict[str, str]) -> list[dict[str, Any]]:
    """The questions of a split, each with the hash of its picture."""
    try:
        return [
            {
                "image": f"{owner}/{number}.png",
                "group": seen[f"{owner}/{number}.png"],
                "question": question,
                "answer": answer,
                "kind": "yes/no" if answer in ("yes", "no") else "other",
            }
            for question, answer, number in json.loads(found[f"{DATA}{owner}/questions.json"])
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{DATA}{owner}/questions.json is no list of question, answer and picture: {error!r}"
        ) from None
