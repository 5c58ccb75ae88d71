"""The demo data go through the real tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from metalm.data.demo.dataset import write_pointing, write_scenes
from metalm.data.demo.scenes import COLOURS, draw_scene, make_scene
from metalm.data.storage.index import open_index
from metalm.data.tokenizer import load_tokenizer

TOOLS = Path(__file__).parents[3] / "tools"


def run(tool: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(TOOLS / tool), *map(str, arguments)], check=True, timeout=120)


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
    assert len(lines) == len(records) > 15
    for line, record in zip(map(json.loads, lines), map(json.loads, records), strict=True):
        (image, asked), (answer,) = (message["content"] for message in line["messages"][:2])
        assert asked["text"] == f"where is the {record['name']}?"
        assert (image["image"], answer["box"]) == (record["path"], record["box"])
        *_, (_, place, _), (named,) = (message["content"] for message in line["messages"])
        pixels = Image.open(tmp_path / "scenes" / image["image"])
        for name, (left, top, right, bottom) in (
            (record["name"], record["box"]),
            (named["text"], place["box"]),
        ):
            middle = pixels.getpixel((int(32 * (left + right)), int(32 * (top + bottom))))
            rgb = COLOURS[name.split()[0]]
            assert max(abs(one - other) for one, other in zip(middle, rgb, strict=True)) < 30
