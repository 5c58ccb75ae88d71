"""The demo data go through the real tools."""

from __future__ import annotations

import json
import subprocess
import sys
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


def test_questions_about_boxes_and_their_records_tell_what_is_drawn(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", "heldout", 20, seed=4, image_size=64)
    write_pointing(tmp_path, "heldout", 20, seed=4)
    asked: dict[str, list[Any]] = {
        kind: [json.loads(line)["messages"] for line in (tmp_path / f"pointing/{kind}_heldout.jsonl").open()]
        for kind in ("places", "names")
    }
    assert len(asked["names"]) == 3 * len(asked["places"]) > 60
    told: dict[str, dict[str, Any]] = {}
    for number, (question, answer) in enumerate(asked["places"]):
        image, where = question["content"]
        (place,) = answer["content"]
        name = where["text"].removeprefix("where is the ").removesuffix("?")
        told.setdefault(image["image"], {})[name] = place["box"]
        what, is_there, is_absent = asked["names"][3 * number : 3 * number + 3]
        assert what[0]["content"][2] == place
        assert what[1]["content"] == [{"type": "text", "text": name}]
        assert is_there[0]["content"][1]["text"] == f"is there a {name}?"
        assert [answer["content"][0]["text"] for _, answer in (is_there, is_absent)] == ["yes", "no"]
        assert {turn[0]["content"][0]["image"] for turn in (what, is_there, is_absent)} == {image["image"]}
        colour, shape = is_absent[0]["content"][1]["text"].removeprefix("is there a ").rstrip("?").split()
        assert f"{colour} {shape}" not in make_scene(4, "heldout", int(image["image"][-10:-4])).caption
        pixels = Image.open(tmp_path / "scenes" / image["image"])
        left, top, right, bottom = place["box"]
        middle = pixels.getpixel((int(32 * (left + right)), int(32 * (top + bottom))))
        assert max(abs(one - other) for one, other in zip(middle, COLOURS[name.split()[0]], strict=True)) < 30
    records = [json.loads(line) for line in (tmp_path / "scenes/pointing_heldout.jsonl").open()]
    assert [record["path"] for record in records] == list(told)
    assert all(told[record["path"]][record["name"]] == record["box"] for record in records)
