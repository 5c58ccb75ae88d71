"""The demo data go through the real tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from metalm.data.demo.dataset import write_scenes
from metalm.data.demo.scenes import draw_scene, make_scene
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
