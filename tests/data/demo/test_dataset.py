"""The demo data go through the real tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distributed.ranks import run_command
from metalm.commands.scripts import load_script
from metalm.data.demo.dataset import write_pointing, write_scenes
from metalm.data.demo.scenes import COLOURS, draw_scene, make_scene
from metalm.data.storage.index import open_index
from metalm.data.tokenizer import load_tokenizer
from metalm.errors import ConfigError

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


def prepare(out: Path, *options: str) -> tuple[int, str]:
    return run_command([sys.executable, str(TOOLS / "prepare_demo.py"), str(out), *options], timeout_s=60)


def test_finished_demo_data_of_other_options_stay_as_they_are(tmp_path: Path) -> None:
    raw = tmp_path / "raw/text/train.jsonl"
    raw.parent.mkdir(parents=True)
    raw.write_text("mine")
    code, output = prepare(tmp_path)
    assert code == 64 and "no record of the options that made them: name a new folder" in output
    (tmp_path / "preparation").mkdir()
    plan = {"scenes": 200, "evaluation_scenes": 1000, "text_mib": 12}
    (tmp_path / "preparation/plan.json").write_text(json.dumps(plan))
    code, output = prepare(tmp_path, "--scenes", "300")
    assert code == 64 and "(scenes was 200, is 300): repeat the first command to go on" in output
    assert raw.read_text() == "mine"


def test_demo_data_are_prepared_again_by_the_same_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_script(TOOLS / "prepare_demo.py", "prepare_demo")
    typed: list[list[str]] = []

    def ends_well(command: list[str]) -> subprocess.CompletedProcess[str]:
        typed.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", ends_well)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["prepare_demo", str(tmp_path / "demo"), "--scenes", "9"])
        assert tool.main() == 0
    num_behind = len(typed) // 2
    assert "make_demo_data.py" in typed[0][1]
    assert typed[1 : num_behind + 1] == typed[num_behind + 1 :]  # raw data that are there are not drawn anew
    typed.clear()
    monkeypatch.setattr(sys, "argv", ["prepare_demo", str(tmp_path / "demo"), "--scenes", "8"])
    with pytest.raises(ConfigError, match="scenes was 9, is 8"):
        tool.main()
    assert not typed
