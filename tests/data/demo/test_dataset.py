"""The demo data go through the real tools."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metalm.data.demo.dataset import write_pointing, write_scenes
from metalm.data.demo.scenes import COLOURS, draw_scene, make_scene
from metalm.data.storage.index import open_index
from metalm.data.tokenizer import load_tokenizer

TOOLS = Path(__file__).parents[3] / "tools"


def run(tool: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(TOOLS / tool), *map(str, arguments)], check=True, timeout=120)


def pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def test_written_scenes_are_the_drawn_ones(tmp_path: Path) -> None:
    write_scenes(tmp_path, "unseen", 3, seed=4, image_size=32)
    rows = [json.loads(line) for line in (tmp_path / "unseen.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        scene = make_scene(4, "unseen", index)
        assert row["caption"] == scene.caption
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["path"])), draw_scene(scene, 32))


def test_demo_data_become_shards(tmp_path: Path) -> None:
    raw, text, scenes = tmp_path / "raw", tmp_path / "text", tmp_path / "scenes"
    sizes = ["--scenes", 1500, "--evaluation-scenes", 10, "--text-mib", 0.5]
    run("make_demo_data.py", raw, *sizes)
    sources = [raw / "text" / "train.jsonl", "--captions", raw / "scenes" / "train.jsonl"]
    run("train_tokenizer.py", *sources, "--vocab-size", 2000, "--out", tmp_path / "tokenizer")
    run(
        "prepare_text.py",
        raw / "text" / "train.jsonl",
        *("--tokenizer", tmp_path / "tokenizer", "--out", text, "--processes", 1),
    )
    run("prepare_image_text.py", raw / "scenes" / "train.jsonl", "--out", scenes, "--processes", 1)

    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert open_index(text).tokenizer_fingerprint == tokenizer.fingerprint
    assert open_index(scenes).num_samples == 1500
    captions = [json.loads(line)["caption"] for line in (raw / "scenes" / "train.jsonl").open()]
    lengths = [len(ids) for ids in tokenizer.encode(captions)]
    assert lengths == [len(caption.split()) for caption in captions]


def test_chats_about_boxes_and_their_records_tell_what_is_drawn(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", "heldout", 20, seed=4, image_size=64)
    write_pointing(tmp_path, "heldout", 20, seed=4)
    lines = (tmp_path / "pointing/heldout.jsonl").read_text().splitlines()
    records = (tmp_path / "scenes/pointing_heldout.jsonl").read_text().splitlines()
    assert len(lines) == 4 * len(records) > 60
    for number, record in enumerate(map(json.loads, records)):
        where, what, listed, named = (
            [message["content"] for message in json.loads(line)["messages"]]
            for line in lines[4 * number : 4 * number + 4]
        )
        (image, asked), (answer,) = where[:2]
        assert asked["text"] == f"where is the {record['name']}?"
        assert (image["image"], answer["box"]) == (record["path"], record["box"])
        told = [(name["text"].strip(), box["box"]) for box, name in pairs(listed[1])]
        assert (record["name"], record["box"]) in told
        assert [(name["text"], place[-2]["box"]) for place, (name,) in pairs(what)] == [
            (asked[-1]["text"].removeprefix("where is the ").removesuffix("?"), answer["box"])
            for asked, (answer,) in pairs(where)
        ]
        assert [part["text"] for part in named[1]] == [" and ".join(name for name, _ in told)]
        pixels = Image.open(tmp_path / "scenes" / image["image"])
        for name, (left, top, right, bottom) in told:
            middle = pixels.getpixel((int(32 * (left + right)), int(32 * (top + bottom))))
            rgb = COLOURS[name.split()[0]]
            assert max(abs(one - other) for one, other in zip(middle, rgb, strict=True)) < 30
