"""Writes the demo data as the raw input that the preparation tools read.

OUT/text/{train,heldout}.jsonl          Pile format
OUT/scenes/{train,heldout,unseen}.jsonl {"path": "images/train/00/000000.png", "caption": "..."}
OUT/scenes/images/...
OUT/chats/{train,heldout}.jsonl         messages about the scenes, whose images they name
OUT/chats/text.jsonl                    alpaca's records, about the captions alone
OUT/pointing/{places,names}_{train,heldout}.jsonl
                                        messages, a question each: where a thing stands in a scene; what
                                        stands in a box, and whether something is there
OUT/pointing/text.jsonl                 what is said there, in Pile format, to train a tokenizer on
OUT/scenes/pointing_{train,heldout}.jsonl
                                        {"path": ..., "name": "red circle", "box": [0.1, 0.2, 0.5, 0.6]}
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metalm.data.demo.library_text import standard_library_documents
from metalm.data.demo.scenes import COLOURS, SHAPES, Cell, SceneObject, draw_scene, make_scene
from metalm.modalities.boxes import box_text
from metalm.progress import Phase

IMAGES_PER_FOLDER = 1000
_NUMBERS = ("one", "two", "three")

Said = str | Cell
"""A text, or a box."""
Turn = tuple[list[Said], list[Said]]
"""A question and its answer."""


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
    """Writes chats of one question each about every thing of the scenes, see `_asked_about`, and a record of
    where one thing of each scene stands. What is there twice is not asked for."""
    (out / "pointing").mkdir(parents=True, exist_ok=True)
    with (
        (out / "pointing" / f"places_{split}.jsonl").open("w", encoding="utf-8") as places,
        (out / "pointing" / f"names_{split}.jsonl").open("w", encoding="utf-8") as names,
        (out / "scenes" / f"pointing_{split}.jsonl").open("w", encoding="utf-8") as records,
    ):
        for index in range(num_scenes):
            stream = random.Random(f"{seed}:pointing:{split}:{index}")
            objects = make_scene(seed, split, index).objects
            items = _alone_of_their_kind(objects)
            stream.shuffle(items)
            path = _image_path(split, index).as_posix()
            for item in items[:1]:
                records.write(json.dumps({"path": path, "name": _named(item), "box": item.box}) + "\n")
            for item in items:
                place, *others = _asked_about(item, objects, stream)
                places.write(_chat(path, place))
                names.writelines(_chat(path, other) for other in others)


def write_pointing_text(folder: Path, num_scenes: int, *, seed: int) -> None:
    """Writes text.jsonl with what is said in such chats about the first scenes of training."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(num_scenes):
            stream = random.Random(f"{seed}:pointing:text:{index}")
            objects = make_scene(seed, "train", index).objects
            turns = [turn for item in objects for turn in _asked_about(item, objects, stream)]
            for said in itertools.chain.from_iterable(turns):
                text = "".join(one if isinstance(one, str) else box_text(one) for one in said)
                lines.write(json.dumps({"text": text}) + "\n")


def _asked_about(item: SceneObject, objects: Sequence[SceneObject], stream: random.Random) -> list[Turn]:
    """Where a thing stands, what stands there, whether it is there, and whether something alike is that is
    not."""
    name = _named(item)
    return [
        ([f"where is the {name}?"], [item.box]),
        (["what is in ", item.box, "?"], [name]),
        ([f"is there a {name}?"], ["yes"]),
        ([f"is there a {_absent(item, objects, stream)}?"], ["no"]),
    ]


def _absent(item: SceneObject, objects: Sequence[SceneObject], stream: random.Random) -> str:
    """What is not in a scene, but has the colour or the shape of a thing that is, or both of two."""
    alike = [(other.colour, shape) for other in objects for shape in SHAPES]
    alike += [(colour, item.shape) for colour in COLOURS]
    there = {(other.colour, other.shape) for other in objects}
    colour, shape = stream.choice(sorted(set(alike) - there))
    return f"{colour} {shape}"


def _chat(image: str, turn: Turn) -> str:
    """A line of a question about an image, and its answer."""
    asked, answer = ([_part(one) for one in said] for said in turn)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, *asked]},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps({"messages": messages}) + "\n"


def _part(said: Said) -> dict[str, Any]:
    return {"type": "text", "text": said} if isinstance(said, str) else {"type": "box", "box": said}


def _alone_of_their_kind(objects: Sequence[SceneObject]) -> list[SceneObject]:
    counts = Counter(map(_named, objects))
    return [item for item in objects if counts[_named(item)] == 1]


def _named(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


def _image_path(split: str, index: int) -> Path:
    return Path("images", split, f"{index // IMAGES_PER_FOLDER:02d}", f"{index:06d}.png")
