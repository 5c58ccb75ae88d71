"""OpenMoji: drawings of faces, people, things and flags, with their names.

Those that have another colour of skin alone are left out; a man, a woman and a person who do the same belong
together.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from metalm.errors import DataError
from metalm.reproduction.data.archives import read_members
from metalm.reproduction.data.captioned import Captioned, draw, write_captioned
from metalm.reproduction.data.packages import OPENMOJI
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import normalised

PACKAGES = (OPENMOJI,)
TABLE, DRAWINGS = "package/data/openmoji.csv", "package/color/svg/"
_PEOPLE = re.compile(r"\b(and )?(man|men|woman|women|person|people|boy|girl)\b")


def write(files: dict[str, Path], folder: SetFolder) -> None:
    """Write pictures, pairs and the task `openmoji_captions`."""
    found = dict(
        read_members(
            files[OPENMOJI.name],
            lambda name: name == TABLE or (name.startswith(DRAWINGS) and name.endswith(".svg")),
        )
    )
    try:
        rows = list(csv.DictReader(io.StringIO(found[TABLE].decode())))
        pictures = [
            Captioned(
                path=f"pictures/{row['hexcode']}.png",
                content=draw(found[f"{DRAWINGS}{row['hexcode']}.svg"], row["hexcode"]),
                captions=(row["annotation"],),
                group=_group(row["annotation"]),
                kind=f"{row['group']}/{row['subgroups']}",
            )
            for row in rows
            if not row["skintone"]
        ]
    except KeyError as error:
        raise DataError(f"{files[OPENMOJI.name]} lacks {error}: get the package again") from None
    write_captioned(pictures, "openmoji_captions", folder)


def _group(name: str) -> str:
    """A name without who does it, and without what is behind the colon, unless that is all it says."""
    what, _, detail = name.partition(":")
    parts = (detail,) if what == "flag" else (what, detail)
    return next(filter(None, (normalised(_PEOPLE.sub("", part)) for part in parts)), name)
