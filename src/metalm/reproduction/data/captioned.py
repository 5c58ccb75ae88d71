"""Pictures with captions, as pairs for pretraining and as a task; and how drawings are made to pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from metalm.errors import ConfigError, DataError
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import connected, split_by_group

SIDE_PIXELS = 128
"""Of the longer side of a drawing."""


@dataclass(frozen=True)
class Captioned:
    """A picture, what is said of it, and what it belongs to."""

    path: str
    content: bytes
    captions: tuple[str, ...]
    group: str
    kind: str
    """The owner's category."""


def write_captioned(pictures: Sequence[Captioned], task: str, folder: SetFolder) -> None:
    """Write pictures into `pairs/`, with a list of each side there, and the task of captioning.

    Groups in which the same picture stands, such as the flags of two places, are one.
    """
    firsts = connected([(picture.group, hashlib.sha256(picture.content).digest()) for picture in pictures])
    pictures = [
        replace(one, group=pictures[first].group) for one, first in zip(pictures, firsts, strict=True)
    ]
    for picture in pictures:
        folder.write(f"pairs/{picture.path}", picture.content)
    sides = {
        side: [
            {
                "path": picture.path,
                "captions": list(picture.captions),
                "group": picture.group,
                "kind": picture.kind,
            }
            for picture in kept
        ]
        for side, kept in split_by_group(pictures, lambda picture: picture.group).items()
    }
    for side, records in sides.items():
        folder.write_lines(f"pairs/{side}.jsonl", records)
    folder.write_task(task, sides)


def draw(svg: bytes, name: str) -> bytes:
    """A drawing as a PNG file on white, `SIDE_PIXELS` on its longer side.

    Raises:
        ConfigError: the package that draws is not installed.
        DataError: it is no SVG file.
    """
    try:
        import resvg_py
    except ImportError:
        raise ConfigError(
            "drawings (SVG) are made to pixels by the package resvg-py: pip install 'metalm[drawings]'"
        ) from None
    try:
        # No fonts: what is drawn must not depend on the machine.
        return bytes(
            resvg_py.svg_to_bytes(
                svg_string=svg.decode(),
                width=SIDE_PIXELS,
                height=SIDE_PIXELS,
                dpi=96.0,  # without, sizes in points are nothing
                background="white",
                skip_system_fonts=True,
            )
        )
    except ValueError as error:
        raise DataError(f"{name} is no drawing: {error}") from None
