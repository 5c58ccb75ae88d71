"""What is made of tasks: texts of the training side alone, shuffled labels, other wordings."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from metalm.errors import ConfigError, DataError
from metalm.reproduction.groups import check_groups
from metalm.reproduction.random_encoder import write_random_encoder
from metalm.reproduction.variants import (
    write_blind,
    write_encoded,
    write_mismatched,
    write_shuffled,
    write_texts,
    write_worded,
)
from metalm.tasks.records import TaskData
from metalm.tasks.rendering import render
from metalm.tasks.task_file import find_tasks, load_task
from reproduction.invented import write_task

TEXTS = {
    "train": ["good one", "bad one", "good two", "bad two", "fair one", "poor one"] * 4,
    "test": ["unseen"],
}


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path, TEXTS)


def records(path: Path, data: Path, split: str) -> list[tuple[str, str]]:
    found = TaskData(load_task(path), data).records(split)
    return [(record.fields["text"], record.answers[0]) for record in found]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shuffled_labels_are_the_same_ones_on_other_records(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "shuffled"
    write_shuffled(task, tmp_path, out, seed=0)
    before, after = records(task, tmp_path, "train"), records(out / task.name, out, "train")
    assert [text for text, _ in after] == [text for text, _ in before]
    assert Counter(label for _, label in after) == Counter(label for _, label in before)
    same = sum(old == new for (_, old), (_, new) in zip(before, after, strict=True))
    assert same < len(before)
    assert records(out / task.name, out, "test") == records(task, tmp_path, "test")


def test_texts_to_pretrain_on_are_of_the_training_side_and_once_each(task: Path, tmp_path: Path) -> None:
    assert write_texts([task], tmp_path, ["text"], tmp_path / "texts.jsonl", seed=0) == 6
    assert sorted(line["text"] for line in lines(tmp_path / "texts.jsonl")) == sorted(set(TEXTS["train"]))


def test_a_tokenizer_learns_the_wording_with_its_answers(task: Path, tmp_path: Path) -> None:
    write_worded([task], tmp_path, tmp_path / "worded.jsonl", most=2)
    first, second = lines(tmp_path / "worded.jsonl")
    assert first["text"].startswith("Text: ")
    assert first["text"].split(" ")[-1] in ("yes", "no")
    assert first != second


def test_all_but_the_answer_is_encoded(task: Path, tmp_path: Path) -> None:
    write_encoded(task, tmp_path / "encoded")
    read = load_task(tmp_path / "encoded" / task.name)
    (record, *_) = TaskData(read, tmp_path).records("test")
    span, target = render(read, read.templates[0], record, "yes").parts
    assert (span.content, span.is_encoded) == ("Text: unseen\n\nAnswer:", True)
    assert (target.content, target.is_trained) == (" yes", True)


def test_a_blind_task_has_no_image(task: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(task.read_text())
    content["data"]["media"] = {"image": "{text}.png"}
    content["templates"][0]["span"].insert(0, {"image": "image"})
    task.write_text(yaml.safe_dump(content))
    write_blind(task, tmp_path / "blind")
    blind = load_task(tmp_path / "blind" / task.name)
    assert blind.templates[0].span == ("Text: {text}",)
    assert not blind.data.media
    with pytest.raises(DataError, match="the task has no images"):
        write_blind(tmp_path / "blind" / task.name, tmp_path / "blinder")


def test_wordings_of_other_shapes_are_varied_or_refused(tmp_path: Path) -> None:
    shipped = find_tasks()
    write_encoded(shipped["winogrande"], tmp_path)  # its in-context wording has no span
    assert load_task(tmp_path / "winogrande.yaml").icl is not None
    write_blind(shipped["nlvr2"], tmp_path)
    assert not load_task(tmp_path / "nlvr2.yaml").data.media
    with pytest.raises(DataError, match="a wording has several spans"):
        write_encoded(shipped["nlvr2"], tmp_path)
    with pytest.raises(DataError, match="the task has no split train"):
        write_worded([shipped["nocaps"]], tmp_path, tmp_path / "worded.jsonl", most=2)


def test_images_of_other_records_are_asked_about(tmp_path: Path) -> None:
    texts = {"train": ["good 0"], "test": [f"good {number}" for number in range(1, 9)]}
    task = write_task(tmp_path, texts)
    content = yaml.safe_load(task.read_text())
    content["data"]["fields"]["picture"] = "text"
    content["data"]["media"] = {"image": "pictures/{picture}.png"}
    task.write_text(yaml.safe_dump(content))
    (tmp_path / "invented/pictures").mkdir()
    (tmp_path / "invented/pictures/good 3.png").write_bytes(b"three")
    out = tmp_path / "mismatched"
    for seed in range(20):
        write_mismatched(task, tmp_path, out, seed=seed)
        found = TaskData(load_task(out / task.name), out).records("test")
        assert all(record.fields["picture"] != own for record, own in zip(found, texts["test"], strict=True))
    write_mismatched(task, tmp_path, out, seed=0)
    found = TaskData(load_task(out / task.name), out).records("test")
    assert sorted(record.fields["picture"] for record in found) == sorted(texts["test"])
    (three,) = [record for record in found if record.fields["picture"] == "good 3"]
    assert three.fields["image"].read() == b"three"


def test_images_that_lie_beside_the_records_are_found(tmp_path: Path) -> None:
    task = write_task(tmp_path, {"train": ["good 0"], "test": ["good 1", "good 2"]})
    content = yaml.safe_load(task.read_text())
    content["data"]["media"] = {"image": "{text}.png"}
    task.write_text(yaml.safe_dump(content))
    (tmp_path / "invented/good 2.png").write_bytes(b"two")
    write_mismatched(task, tmp_path, tmp_path / "out", seed=0)
    first = TaskData(load_task(tmp_path / "out" / task.name), tmp_path / "out").records("test")[0]
    assert first.fields["image"].read() == b"two"


def test_what_cannot_be_dealt_is_refused(task: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(task.read_text())
    content["data"]["fields"]["label"] = "label|lower"
    task.write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match=r"label is 'label\|lower', and not a key of the records"):
        write_shuffled(task, tmp_path, tmp_path / "out", seed=0)
    content["data"]["fields"]["label"] = "label"
    content["data"]["hold_out"] = {"validation": {"of": "train", "last": 2}}
    task.write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match="validation is held out of train"):
        write_shuffled(task, tmp_path, tmp_path / "out", seed=0)
    content["data"]["hold_out"] = {}
    content["data"]["media"] = {"image": "{text}.png"}
    task.write_text(yaml.safe_dump(content))
    (tmp_path / "invented/test.jsonl").write_text('{"text": "x", "label": "yes", "group": "x"}\n' * 3)
    with pytest.raises(DataError, match="nearly all records have the same value 'x'"):
        write_mismatched(task, tmp_path, tmp_path / "out", seed=0)


def test_a_group_on_two_sides_is_refused(task: Path, tmp_path: Path) -> None:
    check_groups(load_task(task), tmp_path)
    folder = tmp_path / "invented"
    known = (folder / "train.jsonl").read_text().splitlines()[0]
    with (folder / "test.jsonl").open("a") as file:
        file.write(known + "\n")
    with pytest.raises(DataError, match=r"is in train and in test"):
        check_groups(load_task(task), tmp_path)


def test_a_record_without_a_group_is_refused(task: Path, tmp_path: Path) -> None:
    (tmp_path / "invented/test.jsonl").write_text('{"text": "x", "label": "yes"}\n')
    with pytest.raises(DataError, match="the record has no 'group'"):
        check_groups(load_task(task), tmp_path)


def test_every_variant_that_reads_records_looks_at_their_groups(task: Path, tmp_path: Path) -> None:
    file = tmp_path / "invented/test.jsonl"
    train = tmp_path / "invented/train.jsonl"
    file.write_text(train.read_text())
    for write in (
        lambda out: write_worded([task], tmp_path, out / "texts.jsonl", most=5),
        lambda out: write_shuffled(task, tmp_path, out, seed=0),
    ):
        with pytest.raises(DataError, match="is in .* and in .*, so what is tested would be known"):
            write(tmp_path / "out")


def test_a_field_or_a_side_that_is_not_there_is_said(task: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no field 'nosuch'; the task has text"):
        write_texts([task], tmp_path, ["nosuch"], tmp_path / "texts.jsonl", seed=0)
    content = yaml.safe_load(task.read_text())
    del content["data"]["files"]["train"]
    task.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="has no split train"):
        write_shuffled(task, tmp_path, tmp_path / "out", seed=0)


def test_a_random_encoder_has_the_shape_of_the_real_one_and_nothing_of_its_weights(tmp_path: Path) -> None:
    real = {
        "embeddings.position_ids": torch.arange(4)[None],
        "embeddings.LayerNorm.weight": torch.full((8,), 3.0),
        "embeddings.LayerNorm.bias": torch.full((8,), 3.0),
        "encoder.layer.0.output.dense.weight": torch.full((64, 64), 3.0),
    }
    folder = tmp_path / "real"
    folder.mkdir()
    save_file(real, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    write_random_encoder(folder, tmp_path / "random", seed=0)
    drawn = load_file(tmp_path / "random/model.safetensors")
    assert {name: weight.shape for name, weight in drawn.items()} == {n: w.shape for n, w in real.items()}
    assert torch.equal(drawn["embeddings.position_ids"], real["embeddings.position_ids"])
    assert drawn["embeddings.LayerNorm.weight"].eq(1).all()
    assert drawn["embeddings.LayerNorm.bias"].eq(0).all()
    assert drawn["encoder.layer.0.output.dense.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert (tmp_path / "random/config.json").read_text() == "{}"
