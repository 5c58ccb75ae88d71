"""Writes the demo data as the raw input that the preparation tools read.

OUT/text/{train,heldout}.jsonl          Pile format
OUT/scenes/{train,heldout,unseen}.jsonl {"path": "images/train/00/000000.png", "caption": "..."}
OUT/scenes/images/...
"""

from __future__ import annotations

import json
from pathlib import Path

from metalm.data.demo.library_text import standard_library_documents
from metalm.data.demo.scenes import draw_scene, make_scene

IMAGES_PER_FOLDER = 1000


def write_text(folder: Path, max_bytes: int) -> dict[str, int]:
    """Writes train.jsonl and heldout.jsonl; returns the number of documents of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "heldout": 0}
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "heldout.jsonl").open("w", encoding="utf-8") as heldout,
    ):
        for document in standard_library_documents(max_bytes):
            line = {"text": document.text, "meta": {"pile_set_name": document.pile_set_name}}
            (heldout if document.is_held_out else train).write(json.dumps(line) + "\n")
            counts["heldout" if document.is_held_out else "train"] += 1
    return counts


def write_scenes(folder: Path, split: str, num_scenes: int, *, seed: int, image_size: int) -> None:
    """Writes SPLIT.jsonl and images/SPLIT/*/*.png with `num_scenes` scenes, see `make_scene`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as captions:
        for index in range(num_scenes):
            scene = make_scene(seed, split, index)
            path = Path("images", split, f"{index // IMAGES_PER_FOLDER:02d}", f"{index:06d}.png")
            if index % IMAGES_PER_FOLDER == 0:
                (folder / path.parent).mkdir(parents=True, exist_ok=True)
            draw_scene(scene, image_size).save(folder / path, compress_level=1)
            captions.write(json.dumps({"path": path.as_posix(), "caption": scene.caption}) + "\n")
