"""Tux Paint's stamps: photographs and drawings in categories, with an English caption each.

Pictures of one caption, such as a bird and the same bird turned around, belong together.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from metalm.reproduction.data.archives import read_members
from metalm.reproduction.data.captioned import Captioned, draw, write_captioned
from metalm.reproduction.data.packages import TUXPAINT
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import normalised

PACKAGES = (TUXPAINT,)
STAMPS = "usr/share/tuxpaint/stamps/"


def write(files: dict[str, Path], folder: SetFolder) -> None:
    """Write pictures, pairs and the task `tuxpaint_captions`."""
    found = dict(
        read_members(
            files[TUXPAINT.name],
            lambda name: name.startswith(STAMPS) and name.endswith((".png", ".svg", ".txt")),
        )
    )
    pictures = []
    for name in sorted(found):
        stem = PurePosixPath(name).with_suffix("")
        text = found.get(f"{stem}.txt", b"").decode("utf-8", "replace")
        caption = text.partition("\n")[0].strip()  # translations follow
        has_pixels = f"{stem}.png" in found
        if not caption or name.endswith(".txt") or (name.endswith(".svg") and has_pixels):
            continue
        place = stem.relative_to(STAMPS)
        content = found[name] if has_pixels else draw(found[name], name)
        pictures.append(
            Captioned(f"pictures/{place}.png", content, (caption,), normalised(caption), str(place.parent))
        )
    write_captioned(pictures, "tuxpaint_captions", folder)
