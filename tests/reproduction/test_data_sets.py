"""What is written of each package: tasks that can be read, split by group, the same bytes each time."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import pytest

from metalm.data.preparation.pair_sources import Pair, list_records, read_record
from metalm.data.preparation.text_document import PILE_FIELDS
from metalm.data.preparation.text_files import documents, open_text_files
from metalm.errors import ConfigError
from metalm.modalities import MEDIA
from metalm.modalities.image import encode_png
from metalm.reproduction.data import bigbench, openmoji, wordnet
from metalm.reproduction.data.sets import SETS, fetch_set
from metalm.reproduction.data.splitting import connected, normalised, side_of, split_by_group
from metalm.tasks.readers import MediaFile
from metalm.tasks.records import TaskData
from metalm.tasks.showing import check_task
from metalm.tasks.task_file import load_task
from reproduction.small_packages import (
    BIGBENCH_FOLDERS,
    FEVER_START,
    MAKERS,
    make_bigbench,
    make_package,
    picture,
    scores,
)

SIDES = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _drawings_are_made_to_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for resvg-py, whose pictures differ as the drawings do."""
    package = types.ModuleType("resvg_py")

    def svg_to_bytes(*, svg_string: str, width: int, dpi: float, **_: Any) -> list[int]:
        assert (width, dpi) == (128, 96.0)
        return list(encode_png(picture(zlib.crc32(svg_string.encode()))))

    vars(package)["svg_to_bytes"] = svg_to_bytes
    monkeypatch.setitem(sys.modules, "resvg_py", package)


def fetched(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_package(name, folder / "packages", monkeypatch)
    fetch_set(name, folder / "real", folder / "packages")
    return folder / "real"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", SETS)
def test_tasks_are_read_whole_and_no_group_is_on_two_sides(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fetched(name, tmp_path, monkeypatch)
    files = sorted((root / name / "tasks").glob("*.yaml")) if name != "minilm" else []
    for file in files:
        task = load_task(file)
        assert task.data.folder == name
        said = list(check_task(str(file), root))
        assert len(said) == 3 and not any("left out" in line for line in said), (file.name, said)
        groups = {}
        for side in SIDES:
            rows = lines(file.with_suffix("") / f"{side}.jsonl")
            groups[side] = {row["group"] for row in rows}
            for media in {m for r in TaskData(task, root).records(side) for m in r.fields.values()
                          if isinstance(m, MediaFile)}:  # fmt: skip
                assert MEDIA["image"].decode(media.read()).ndim == 3
        for one, other in itertools.combinations(SIDES, 2):
            assert groups[one] and groups[one].isdisjoint(groups[other]), (file.name, one, other)


@pytest.mark.parametrize("name", SETS)
def test_the_same_bytes_are_written_each_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetched(name, tmp_path, monkeypatch)
    fetch_set(name, tmp_path / "again", tmp_path / "packages")
    written = {
        root: {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (first, tmp_path / "again")
    }
    assert len(written[first]) > 2
    assert written[first] == written[tmp_path / "again"]


def test_claims_passages_and_articles_are_on_one_side_across_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the owner's records have in common."""
    draw = random.Random(5)
    facts = [
        (
            f"Article {draw.randrange(250)}",
            f"Passage {draw.randrange(400)} .",
            f"Claim {draw.randrange(400)}.",
        )
        for _ in range(240)
    ]
    claims = [
        {
            "input": f"{article}: {passage}\nClaim: {claim}",
            "target_scores": {"True": 1, "False": 0, "Neither": 0},
        }
        for article, passage, claim in facts
    ]
    alone = [
        {
            "input": f"{FEVER_START}claim {n}\nQ: Was this claim true or false?",
            "target_scores": scores(["true", "false"], 0),
        }
        for n in range(0, 500, 2)
    ]
    examples = {"vitaminc_fact_verification": claims, "fact_checker/fever": alone}
    monkeypatch.setitem(MAKERS, "bigbench", lambda: make_bigbench(examples))
    folder = fetched("bigbench", tmp_path, monkeypatch) / "bigbench"
    found: dict[str, dict[str, set[str]]] = {side: {} for side in SIDES}
    for side in SIDES:
        rows = lines(folder / f"tasks/bb_vitaminc/{side}.jsonl")
        for key in ("article", "passage", "claim"):
            found[side][key] = {normalised(row[key]) for row in rows}
        others = lines(folder / f"tasks/bb_fever/{side}.jsonl")
        found[side]["claim"] |= {normalised(row["claim"]) for row in others}
    for one, other in itertools.combinations(SIDES, 2):
        for key in found[one]:
            assert found[one][key] and found[one][key].isdisjoint(found[other][key]), (one, other, key)
    (text,) = (folder / "text").iterdir()
    written = {
        normalised(line)
        for one in documents(open_text_files([text], PILE_FIELDS))
        for line in one.text.splitlines()
    }
    assert written >= found["train"]["passage"]
    assert written.isdisjoint(found["validation"]["passage"] | found["test"]["passage"])


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("bb_wikihow_goals", ("step",)),
        ("bb_wikihow_steps", ("goal",)),
        ("bb_cosmos_qa", ("passage",)),
        ("bb_disfl_qa", ("passage",)),
        ("bb_drop", ("passage",)),
        ("bb_quoref", ("passage",)),
        ("bb_ropes", ("background", "story")),
        ("bb_winowhy", ("sentence",)),
        ("bb_social_iqa", ("text",)),
        ("bb_timedial", ("dialogue",)),
        ("bb_xsum", ("article",)),
        ("bb_e2e", ("content",)),
    ],
)
def test_what_is_asked_about_is_on_one_side(task: str, keys: tuple[str, ...], bigbench_folder: Path) -> None:
    for key in keys:
        seen = [
            {normalised(row[key]) for row in lines(bigbench_folder / f"tasks/{task}/{side}.jsonl")}
            for side in SIDES
        ]
        for one, other in itertools.combinations(seen, 2):
            assert one and one.isdisjoint(other)


@pytest.fixture(scope="module")
def bigbench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bigbench")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return fetched("bigbench", folder, monkeypatch) / "bigbench"


def test_brackets_are_written_as_brackets(bigbench_folder: Path) -> None:
    (row, *_) = lines(bigbench_folder / "tasks/bb_vitaminc/train.jsonl")
    assert re.fullmatch(r"Article \d+ \(film\)", row["article"])
    assert re.fullmatch(r"It sold \d+ : copies \.", row["passage"])


def test_goals_are_on_one_side_in_all_three_tasks_about_them(bigbench_folder: Path) -> None:
    goals: dict[str, set[str]] = {side: set() for side in SIDES}
    for side in SIDES:
        for row in lines(bigbench_folder / f"tasks/bb_wikihow_goals/{side}.jsonl"):
            goals[side].add(row["options"][row["answer"]])
        for task in ("bb_wikihow_steps", "bb_wikihow_order"):
            goals[side] |= {row["goal"] for row in lines(bigbench_folder / f"tasks/{task}/{side}.jsonl")}
    for one, other in itertools.combinations(SIDES, 2):
        assert goals[one].isdisjoint(goals[other])


def test_the_place_of_the_right_option_says_nothing(bigbench_folder: Path) -> None:
    """In the package, TimeDial's right phrase is always the last."""
    rows = [row for side in SIDES for row in lines(bigbench_folder / f"tasks/bb_timedial/{side}.jsonl")]
    assert {row["answer"] for row in rows} == {0, 1, 2}
    assert all(row["options"][row["answer"]].endswith("years") for row in rows)


def test_only_text_of_training_sides_is_for_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetched("wordnet", tmp_path, monkeypatch) / "wordnet"
    asked = set()
    for side in SIDES[1:]:
        asked |= {row["definition"] for row in lines(folder / f"tasks/wordnet_definitions/{side}.jsonl")}
        for row in lines(folder / f"tasks/wordnet_same_meaning/{side}.jsonl"):
            asked |= {row["sentence1"], row["sentence2"]}
    texts = [
        document.text for document in documents(open_text_files([folder / "text/wordnet.jsonl"], PILE_FIELDS))
    ]
    assert asked and texts
    assert not any(question in text for question in asked for text in texts)
    assert any("Kind of: nounword a0." in text for text in texts)


def test_of_each_word_as_many_pairs_have_one_meaning_as_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetched("wordnet", tmp_path, monkeypatch) / "wordnet"
    rows = [row for side in SIDES for row in lines(folder / f"tasks/wordnet_same_meaning/{side}.jsonl")]
    for word in {row["word"] for row in rows}:
        labels = [row["label"] for row in rows if row["word"] == word]
        assert 0 < labels.count("same") == labels.count("different") <= wordnet.MOST_PAIRS
    for row in rows:
        assert (row["meanings"][0] == row["meanings"][1]) == (row["label"] == "same")


@pytest.mark.parametrize("name", ["openmoji", "tuxpaint"])
def test_pairs_are_as_the_tool_for_pairs_reads_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetched(name, tmp_path, monkeypatch) / name / "pairs"
    captions: dict[str, set[str]] = {}
    for side in SIDES:
        records = list_records(
            folder / f"{side}.jsonl", MEDIA["image"], path_column="path", caption_column=None
        )
        pairs = [read_record(record, MEDIA["image"]) for record in records]
        assert all(isinstance(pair, Pair) and MEDIA["image"].decode(pair.media).size for pair in pairs)
        captions[side] = {
            normalised(c.replace("woman", "man")) for record in records for c in record.captions or ()
        }
    for one, other in itertools.combinations(SIDES, 2):
        assert captions[one].isdisjoint(captions[other])
    assert not any(
        "dark skin" in caption or "oiseau" in caption for side in SIDES for caption in captions[side]
    )


def test_no_picture_is_on_two_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are called: two places may have one flag."""
    folder = fetched("openmoji", tmp_path, monkeypatch) / "openmoji/pairs"
    side_of: dict[bytes, str] = {}
    for side in SIDES:
        for row in lines(folder / f"{side}.jsonl"):
            assert side_of.setdefault((folder / row["path"]).read_bytes(), side) == side
    assert len(side_of) == 40 * (2 + 1 + 2) and set(side_of.values()) == set(SIDES)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("man: bald", "bald"),
        ("woman and man holding hands", "holding hands"),
        ("woman firefighter", "firefighter"),
        ("flag: Man and Biosphere", "man and biosphere"),
        ("kiss: woman, man", "kiss"),
        ("person", "person"),
    ],
)
def test_who_does_it_makes_no_group(name: str, group: str) -> None:
    assert openmoji._group(name) == group


def test_drawings_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ConfigError, match=r"pip install 'metalm\[drawings\]'"):
        fetched("openmoji", tmp_path, monkeypatch)
    assert not (tmp_path / "real" / "openmoji").exists()


def test_a_picture_of_the_test_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetched("easy-vqa", tmp_path, monkeypatch) / "easy-vqa"
    trained = {row["image"] for side in SIDES[:2] for row in lines(folder / f"tasks/easy_vqa/{side}.jsonl")}
    assert trained == {f"train/{number}.png" for number in range(1, 40)}


def test_yes_and_no_are_as_often_right(bigbench_folder: Path) -> None:
    rows = [row for side in SIDES for row in lines(bigbench_folder / f"tasks/cifar10_yes_no/{side}.jsonl")]
    assert len(rows) == 80
    for row in rows:
        assert (row["kind"] == row["shown"]) == (row["label"] == "yes")
    assert [row["label"] for row in rows].count("yes") == 40


def test_ratings_near_neutral_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetched("vader", tmp_path, monkeypatch) / "vader"
    rows = [row for side in SIDES for row in lines(folder / f"tasks/vader_films/{side}.jsonl")]
    assert len(rows) == 60 - 7  # of 60 sentences, every ninth is neutral
    assert all((row["label"] == "positive") == (row["rating"] > 0) for row in rows)


def test_records_that_share_anything_are_connected() -> None:
    rows = [("a", 1), ("b", 2), ("c", 1), ("c", 3), ("d",), ("b", 3)]
    assert connected(rows) == [0, 0, 0, 0, 4, 0]


def test_shares_of_the_sides() -> None:
    sides = split_by_group(range(5000), lambda number: f"group {number // 2}", {"train": 1000})
    assert len(sides["train"]) == 1000
    assert len(sides["test"]) == pytest.approx(1000, rel=0.15)
    assert len(sides["validation"]) == pytest.approx(500, rel=0.2)
    assert all(side_of(f"group {number // 2}") == side for side in SIDES for number in sides[side])


def test_every_task_of_bigbench_has_a_folder_of_its_own() -> None:
    assert len(BIGBENCH_FOLDERS) == sum(map(len, bigbench.GROUPED))
