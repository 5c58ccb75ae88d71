"""Writes the demo data as the raw input that the preparation tools read.

OUT/text/{train,heldout}.jsonl          Pile format
OUT/scenes/{train,heldout,unseen}.jsonl {"path": "images/train/00/000000.png", "caption": "..."}
OUT/scenes/images/...
OUT/chats/{train,heldout}.jsonl         messages about the scenes, whose images they name
OUT/chats/text.jsonl                    alpaca's records, about the captions alone
"""

from __future__ import annotations

import json
from pathlib import Path

from metalm.data.demo.library_text import standard_library_documents
from metalm.data.demo.scenes import draw_scene, make_scene
from metalm.progress import Phase

IMAGES_PER_FOLDER = 1000
_NUMBERS = ("one", "two", "three")


def write_text(folder: Path, max_bytes: int) -> dict[str, int]:
    """Writes train.jsonl and heldout.jsonl; returns the number of documents of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "heldout": 0}
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "heldout.jsonl").open("w", encoding="utf-8") as heldout,
        Phase("collecting texts"),
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
        for index in Phase.over(f"drawing scenes of {split}", range(num_scenes), "scenes"):
            scene = make_scene(seed, split, index)
            path = _image_path(split, index)
            if index % IMAGES_PER_FOLDER == 0:
                (folder / path.parent).mkdir(parents=True, exist_ok=True)
            draw_scene(scene, image_size).save(folder / path, compress_level=1)
            captions.write(json.dumps({"path": path.as_posix(), "caption": scene.caption}) + "\n")


def write_chats(folder: Path, split: str, num_chats: int, *, seed: int) -> None:
    """Writes SPLIT.jsonl with a chat of three answers about each of the first scenes of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as chats:
        for index in range(num_chats):
            scene = make_scene(seed, split, index)
            image = {"type": "image", "image": _image_path(split, index).as_posix()}
            last = scene.objects[-1]
            turns = [
                ([image, {"type": "text", "text": "what is in the picture?"}], scene.caption),
                ("how many shapes are there?", _NUMBERS[len(scene.objects) - 1]),
                ("which colour has the last one?", last.colour),
            ]
            messages = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
            chats.write(json.dumps({"messages": messages}) + "\n")


def write_instructions(folder: Path, num_records: int, *, seed: int) -> None:
    """Writes text.jsonl with a question about the caption of each of the first scenes of training."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as records:
        for index in range(num_records):
            scene = make_scene(seed, "train", index)
            record = {
                "instruction": "which shape comes first?",
                "input": scene.caption,
                "output": scene.objects[0].shape,
            }
            records.write(json.dumps(record) + "\n")


def _image_path(split: str, index: int) -> Path:
    return Path("images", split, f"{index // IMAGES_PER_FOLDER:02d}", f"{index:06d}.png")
