"""Writes the demo data as the raw input that the preparation tools read.

OUT/text/{train,heldout}.jsonl          Pile format
OUT/scenes/{train,heldout,unseen}.jsonl {"path": "images/train/00/000000.png", "caption": "..."}
OUT/scenes/images/...
OUT/chats/{train,heldout}.jsonl         messages about the scenes, whose images they name
OUT/chats/text.jsonl                    alpaca's records, about the captions alone
OUT/pointing/{train,heldout}.jsonl      messages: where things stand in the scenes, and what stands in a box
OUT/pointing/text.jsonl                 what is said there, in Pile format, to train a tokenizer on
OUT/scenes/pointing_{train,heldout}.jsonl
                                        {"path": ..., "name": "red circle", "box": [0.1, 0.2, 0.5, 0.6]}
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metalm.data.demo.library_text import standard_library_documents
from metalm.data.demo.scenes import Cell, SceneObject, draw_scene, make_scene
from metalm.modalities.boxes import box_text
from metalm.progress import Phase

IMAGES_PER_FOLDER = 1000
_NUMBERS = ("one", "two", "three")

Said = str | Cell
"""A text, or a box."""


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


def write_pointing(out: Path, split: str, num_scenes: int, *, seed: int) -> None:
    """Writes chats that ask where things of a scene stand, in any order, and what stands in one box; and a
    record of what each asks first. What is there twice is not asked for."""
    (out / "pointing").mkdir(parents=True, exist_ok=True)
    with (
        (out / "pointing" / f"{split}.jsonl").open("w", encoding="utf-8") as chats,
        (out / "scenes" / f"pointing_{split}.jsonl").open("w", encoding="utf-8") as records,
    ):
        for index in range(num_scenes):
            stream = random.Random(f"{seed}:pointing:{split}:{index}")
            items = _alone_of_their_kind(make_scene(seed, split, index).objects)
            if not items:
                continue
            stream.shuffle(items)
            path, first = _image_path(split, index).as_posix(), items[0]
            records.write(json.dumps({"path": path, "name": _named(first), "box": first.box}) + "\n")
            messages: list[dict[str, Any]] = []
            for item in items:
                _say(messages, [f"where is the {_named(item)}?"], item.box)
            shown = stream.choice(items)
            _say(messages, ["what is in ", shown.box, "?"], _named(shown))
            messages[0]["content"].insert(0, {"type": "image", "image": path})
            chats.write(json.dumps({"messages": messages}) + "\n")


def write_pointing_text(folder: Path, num_scenes: int, *, seed: int) -> None:
    """Writes text.jsonl with what is said in such chats about the first scenes of training."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(num_scenes):
            for item in make_scene(seed, "train", index).objects:
                name, box = _named(item), box_text(item.box)
                said = (f"where is the {name}?", box, f"what is in {box}?", name)
                lines.write(json.dumps({"text": "\n\n".join(said)}) + "\n")


def _say(messages: list[dict[str, Any]], asked: Sequence[Said], answer: Said) -> None:
    """Adds a question and its answer."""
    for role, said in (("user", asked), ("assistant", [answer])):
        content = [
            {"type": "text", "text": one} if isinstance(one, str) else {"type": "box", "box": one}
            for one in said
        ]
        messages.append({"role": role, "content": content})


def _alone_of_their_kind(objects: Sequence[SceneObject]) -> list[SceneObject]:
    counts = Counter(map(_named, objects))
    return [item for item in objects if counts[_named(item)] == 1]


def _named(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


def _image_path(split: str, index: int) -> Path:
    return Path("images", split, f"{index // IMAGES_PER_FOLDER:02d}", f"{index:06d}.png")
