"""Preparing chats: all forms of input give the same examples, and what is bad is counted by cause."""

from __future__ import annotations

import base64
import gzip
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import webdataset
from pyarrow import parquet

from metalm.data.documents.example import Example, ExamplePart
from metalm.data.preparation import record_tasks
from metalm.data.preparation.chat_shards import prepare_chats
from metalm.data.preparation.example_shards import default_converts, write_examples
from metalm.data.sources import open_source
from metalm.data.storage.index import build_index, open_index
from metalm.data.tokenizer import Tokenizer
from metalm.errors import ConfigError, DataError

RunTool = Callable[..., tuple[int, str, str]]
QUESTION, ANSWER, MORE, LAST = "What is it?", "A fox.", "And its colour?", "Brown."


@pytest.fixture
def media(tmp_path: Path, jpeg: Callable[..., bytes]) -> Path:
    """A folder with fox.jpg in a folder of it."""
    folder = tmp_path / "media" / "train"
    folder.mkdir(parents=True)
    (folder / "fox.jpg").write_bytes(jpeg((120, 60, 0)))
    return folder.parent


def data_uri(media: Path) -> str:
    content = base64.b64encode((media / "train/fox.jpg").read_bytes()).decode()
    return f"data:image/jpeg;base64,{content}"


def typed(image: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": QUESTION}, image]
    turns = [("user", content), ("assistant", ANSWER), ("user", MORE), ("assistant", LAST)]
    return {"messages": [{"role": role, "content": said} for role, said in turns]}


def conversations(question: str, **more: Any) -> dict[str, Any]:
    turns = [("human", question), ("gpt", ANSWER), ("human", MORE), ("gpt", LAST)]
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **more}


def records(media: Path) -> list[dict[str, Any]]:
    """One chat in many forms."""
    name = "train/fox.jpg"
    return [
        typed({"type": "image", "image": name}),
        typed({"type": "image", "path": name}),
        typed({"type": "image_url", "image_url": {"url": data_uri(media)}}),
        {**typed({"type": "image"}), "images": [name]},
        conversations(f"{QUESTION}\n<image>", image=name),
        conversations(f"<image>\n{QUESTION}", image=[name], id="7"),
        conversations(QUESTION, images=[name]),
    ]  # fmt: skip


def read(folder: Path, tokenizer: Tokenizer) -> list[Example]:
    source = open_source("chats", folder, tokenizer)
    return [source.example(one) for one in source.index.locate(np.arange(source.index.num_samples))]


def contents(example: Example) -> list[tuple[object, bool]]:
    return [
        (part.content if isinstance(part.content, str) else bytes(part.content), part.is_trained)
        for part in example.parts
    ]


def prepare(inputs: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    return prepare_chats(inputs, out, converts=default_converts(), settings={}, **options)


def write_lines(path: Path, written: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in written))
    return path


def test_all_forms_are_the_same_example(tmp_path: Path, media: Path, tokenizer: Tokenizer) -> None:
    given = records(media)
    lines = write_lines(tmp_path / "chats.jsonl", given)
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "chats.json").write_text(json.dumps(given))
    inputs = [lines, tmp_path / "more.jsonl.gz", tmp_path / "chats.json"]
    report = prepare(inputs, tmp_path / "out", media_folder=media)
    assert report["dropped"] == {}
    assert (report["examples"], report["answers"], report["media"]) == (21, 42, 21)
    picture = (media / "train/fox.jpg").read_bytes()
    expected = [
        (picture, False), (QUESTION, False), (ANSWER, True), ("\n\n", False), (MORE, False), (LAST, True)
    ]  # fmt: skip
    found = read(tmp_path / "out", tokenizer)
    assert len(found) == 21
    for example in found:
        assert contents(example) == expected
        assert [part.is_encoded for part in example.parts] == [True, True, False, False, True, False]
    alone = tmp_path / "alone"
    prepare([lines], alone, media_folder=media, train="last")
    assert contents(read(alone, tokenizer)[0])[2] == (ANSWER, False)


def test_rows_of_parquet_and_members_of_a_tar_are_read(
    tmp_path: Path, media: Path, tokenizer: Tokenizer
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    picture = (media / "train/fox.jpg").read_bytes()
    row = {**typed({"type": "image", "text": None}), "images": [{"bytes": picture, "path": None}]}
    for message in row["messages"]:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with tarfile.open(tmp_path / "media.tar", "w") as tar:
        tar.add(media / "train/fox.jpg", "./train/fox.jpg")
    lines = write_lines(tmp_path / "chats.jsonl", [records(media)[0]])
    out = tmp_path / "out"
    prepare([tmp_path / "rows.parquet", lines], out, media_folder=tmp_path / "media.tar")
    rows = read(out, tokenizer)
    assert len(rows) == 2
    assert contents(rows[0]) == contents(rows[1])
    assert contents(rows[0])[0] == (picture, False)


def test_alpaca_and_sharegpt_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say A.", "input": "", "output": "A"},
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi <image>"},
                                                 {"from": "gpt", "value": "Hello."}]},
    ]  # fmt: skip
    prepare([write_lines(tmp_path / "a.jsonl", given)], tmp_path / "out")
    found = [contents(example) for example in read(tmp_path / "out", tokenizer)]
    assert found == [
        [("Add.\n\n1 and 2", False), ("3", True)],
        [("Say A.", False), ("A", True)],
        [("Be kind.\n\nHi <image>", False), ("Hello.", True)],
    ]


def test_answers_of_weight_0_are_not_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def weighted(*weights: object) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        for number, weight in enumerate(weights):
            messages.append({"role": "user", "content": f"q{number}"})
            messages.append({"role": "assistant", "content": f"a{number}", "weight": weight})
        return {"messages": messages}

    given = [weighted(0, 1), weighted(1, None, 0), weighted(0), weighted(0.5), weighted("none")]
    report = prepare([write_lines(tmp_path / "a.jsonl", given)], tmp_path / "out")
    assert report["dropped"] == {"bad_weight": 2, "no_answer": 1}
    found = [contents(example) for example in read(tmp_path / "out", tokenizer)]
    assert found == [
        [("q0", False), ("a0", False), ("\n\n", False), ("q1", False), ("a1", True)],
        [("q0", False), ("a0", True), ("\n\n", False), ("q1", False), ("a1", True)],
    ]


def test_the_history_of_an_instruction_is_its_earlier_turns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"instruction": "new q", "output": "new a"}
    given = [
        {**record, "history": [["old q", "old a"]]},
        *(
            {**record, "history": history}
            for history in (None, [], 3, ["old q"], [["old q"]], [["old q", 1]])
        ),
    ]
    report = prepare([write_lines(tmp_path / "a.jsonl", given)], tmp_path / "out")
    assert report["dropped"] == {"bad_turns": 4}
    found = [contents(example) for example in read(tmp_path / "out", tokenizer)]
    new = [("new q", False), ("new a", True)]
    assert found == [[("old q", False), ("old a", True), ("\n\n", False), *new], new, new]


def test_answers_to_a_user_who_says_nothing_are_left_out(tmp_path: Path) -> None:
    def of(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": said} for role, said in turns]}

    asked, answered, nothing = ("user", "q"), ("assistant", "a"), ("user", " ")
    given = [
        of(nothing, answered),
        of(asked, answered, nothing, answered),
        {"instruction": "", "output": "a"},
        of(("system", "s"), nothing, answered),
        of(asked, answered, ("tool", ""), answered),
        of(asked, answered, nothing),
        of(answered, asked, answered),
    ]
    report = prepare([write_lines(tmp_path / "a.jsonl", given)], tmp_path / "out")
    assert (report["examples"], report["dropped"]) == (4, {"empty_question": 3})


def test_placeholders_need_images_where_a_text_does_not_merely_mention_them(
    tmp_path: Path, media: Path
) -> None:
    given = [
        *map(
            conversations, (f"<image>\n{QUESTION}", f"<image>{QUESTION}", f"{QUESTION}\n<image>", "<audio>")
        ),
        {"instruction": f"<image>{QUESTION}", "output": ANSWER},
        *map(conversations, ("What is <image> in SVG?", "Explain <image>")),
        conversations(f"<image>\n{QUESTION}", image="train/fox.jpg"),
    ]
    report = prepare([write_lines(tmp_path / "a.jsonl", given)], tmp_path / "out", media_folder=media)
    assert (report["examples"], report["media"]) == (3, 1)
    assert report["dropped"] == {"bad_placeholders": 5}


def test_boxes_in_a_turn_or_beside_the_turns_are_text(
    tmp_path: Path, media: Path, tokenizer: Tokenizer
) -> None:
    box, other = [0.25, 0.0, 0.5, 1.0], [0, 0, 1, 0.125]
    image = {"type": "image", "image": "train/fox.jpg"}
    asked = [image, {"type": "text", "text": "Which is in "}, {"type": "box", "box": box},
             {"type": "text", "text": "?"}]  # fmt: skip
    answered = [{"type": "text", "text": "A fox "}, {"type": "box", "box": other}]
    given = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]},
        {"image": "train/fox.jpg", "boxes": [box, other],
         "conversations": [{"from": "human", "value": "<image>Which is in <box>?"},
                           {"from": "gpt", "value": "A fox <box>"}]},
    ]  # fmt: skip
    rows = [{**one, "image": None, "conversations": None} for one in given[:1]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    inputs = [write_lines(tmp_path / "a.jsonl", given), tmp_path / "rows.parquet"]
    prepare(inputs, tmp_path / "out", media_folder=media)
    found = [contents(example)[1:] for example in read(tmp_path / "out", tokenizer)]
    assert found == 3 * [
        [("Which is in <box> 8 0 16 32 </box>?", False), ("A fox <box> 0 0 32 4 </box>", True)]
    ]


def test_keys_that_a_table_fills_with_null_are_none(
    tmp_path: Path, media: Path, tokenizer: Tokenizer
) -> None:
    empty = {"role": None, "content": None, "from": None, "value": None}
    given = [
        {"conversations": [empty | {"role": "user", "content": "Hi"}, empty | {"from": "gpt", "value": "A"}]},
        {
            "images": [],
            "image": "train/fox.jpg",
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "A fox."},
            ],
        },
    ]
    prepare([write_lines(tmp_path / "a.jsonl", given)], tmp_path / "out", media_folder=media)
    found = [contents(example) for example in read(tmp_path / "out", tokenizer)]
    picture = (media / "train/fox.jpg").read_bytes()
    assert found == [[("Hi", False), ("A", True)], [(picture, False), ("What?", False), ("A fox.", True)]]
    with pytest.raises(ConfigError, match="begun from other input"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", media_folder=tmp_path)


def test_records_about_a_video_are_left_out_and_counted(
    tmp_path: Path, media: Path, tokenizer: Tokenizer
) -> None:
    turns = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "A fox."}]
    read_alike = {"conversations": [{"from": "human", "value": "Hi"}, turns[1]], "video": None, "videos": []}
    given = [{"video": "fox.mp4", "conversations": turns}, {"videos": ["a.mp4"], "conversations": turns}]
    report = prepare([write_lines(tmp_path / "a.jsonl", [*given, read_alike])], tmp_path / "out")
    assert report["dropped"] == {"video": 2}
    [found] = [contents(example) for example in read(tmp_path / "out", tokenizer)]
    assert found == [("Hi", False), ("A fox.", True)]


def test_bad_boxes_are_counted(tmp_path: Path) -> None:
    def of(box: Any) -> dict[str, Any]:
        turns = [("user", "where?"), ("assistant", [{"type": "box", "box": box}])]
        return {"messages": [{"role": role, "content": said} for role, said in turns]}

    listed = {"instruction": "what is in <box>?", "output": "a fox"}
    given = [
        *(of(box) for box in (None, "a", [0, 0, 1], [0, 0, 640, 480], {"x": 1}, [0, 0, 1, 1])),
        *(
            {**listed, "boxes": boxes}
            for boxes in ([], [[0, 0, 1, 1]] * 2, [[1, 0, 0, 1]], 3, [[0, 0, 1, 1]])
        ),
    ]
    report = prepare([write_lines(tmp_path / "a.jsonl", given)], tmp_path / "out")
    assert report["examples"] == 2
    assert report["dropped"] == {"bad_box": 6, "bad_placeholders": 3}


def test_what_is_bad_is_counted_by_cause(tmp_path: Path, media: Path) -> None:
    (media / "notes.jpg").write_text("no image")
    (tmp_path / "secret.jpg").write_bytes((media / "train/fox.jpg").read_bytes())

    def of(name: str) -> dict[str, Any]:
        return typed({"type": "image", "image": name})

    given = [
        *({"messages": 3}, ["a"], {"text": "a"}), {"messages": ["a"]},
        typed({"type": "video", "video": "a.mp4"}), typed({"type": "image"}),
        {"messages": [{"role": "narrator", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        conversations("<image> or <image>", image="train/fox.jpg"),
        of("gone.jpg"), of("notes.jpg"), of("../secret.jpg"), of("https://host/fox.jpg"),
        of("data:image/jpeg;base64,!"), of("train"),
        {"instruction": "a", "output": "\ud800"}, {"instruction": "a", "output": " "},
        {"instruction": "a", "output": "b"},
    ]  # fmt: skip
    lines = write_lines(tmp_path / "chats.jsonl", given)
    with lines.open("a") as file:
        file.write("{\n\n")
    report = prepare([lines], tmp_path / "out", media_folder=media)
    assert report["examples"] == 1
    assert report["dropped"] == {
        "bad_data_uri_image": 1, "bad_json": 1, "bad_placeholders": 1, "bad_turns": 3, "empty_answer": 1,
        "missing_image": 1, "no_answer": 1, "no_turns": 3, "not_unicode": 1, "outside_image": 1,
        "remote_image": 1, "undecodable_image": 1, "unknown_role": 1, "unreadable_image": 1,
    }  # fmt: skip


def test_inputs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "chats.jsonl", [{"instruction": "a", "output": "b"}])
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "rows.parquet").write_text("no")
    for name, message in (
        ("gone.jsonl", "does not exist"),
        ("object.json", "expected an array of records, found dict"),
        ("broken.json", "is no JSON"),
        ("rows.parquet", "no parquet file"),
    ):
        with pytest.raises(DataError, match=message):
            prepare([tmp_path / name], tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    for name in ("gone", "pipe"):
        with pytest.raises(DataError, match="neither a folder of images and clips nor a tar"):
            prepare([lines], tmp_path / "out", media_folder=tmp_path / name)
    prepare([lines], tmp_path / "out")
    with pytest.raises(ConfigError, match="train was 'all', is 'last'"):
        prepare([lines], tmp_path / "out", train="last")


@pytest.mark.parametrize("edited", ["chats.jsonl", "media.tar"])
def test_an_edited_file_needs_another_folder(edited: str, tmp_path: Path, media: Path) -> None:
    write_lines(tmp_path / "chats.jsonl", records(media)[:1])
    with tarfile.open(tmp_path / "media.tar", "w") as tar:
        tar.add(media / "train/fox.jpg", "train/fox.jpg")
    given: dict[str, Any] = {"media_folder": tmp_path / "media.tar"}
    for _ in range(2):
        prepare([tmp_path / "chats.jsonl"], tmp_path / "out", **given)
    path = tmp_path / edited
    path.write_bytes(path.read_bytes())  # the same content at another time
    prepare([tmp_path / "chats.jsonl"], tmp_path / "out", **given)
    path.write_bytes(path.read_bytes().replace(b"fox", b"cat"))
    with pytest.raises(ConfigError, match=rf"contents\[[01]\] was '{edited}: .*, is '{edited}: "):
        prepare([tmp_path / "chats.jsonl"], tmp_path / "out", **given)


def test_the_tool_writes_shards_that_plain_webdataset_reads(
    tmp_path: Path, media: Path, run_tool: RunTool
) -> None:
    lines = write_lines(tmp_path / "chats.jsonl", records(media))
    out = tmp_path / "out"
    code, printed, errors = run_tool("prepare_chat.py", lines, "--media-folder", media, "--out", out)
    assert code == 0, errors
    assert "7" in printed
    index = open_index(out)
    (shard,) = index.shards
    samples = list(webdataset.WebDataset(str(out / shard.name), shardshuffle=False))
    assert len(samples) == index.num_samples == 7
    for sample in samples:
        assert sample["0.jpg"] == (media / "train/fox.jpg").read_bytes()
        assert json.loads(sample["json"])["parts"][0] == {"image": "0.jpg"}
    (out / "index.json").unlink()
    assert build_index(out, kind="examples").num_samples == 7


def test_examples_are_written_once(tmp_path: Path) -> None:
    example = Example((ExamplePart("a", is_encoded=True), ExamplePart("b", is_trained=True)))
    untrained = Example((ExamplePart("a", is_encoded=True),))
    report = write_examples(iter([example, untrained]), tmp_path, plan={"task": "a"}, name="a")
    assert report["subsets"]["a"]["examples"] == 1
    assert report["dropped"] == {"no_answer": 1}
    assert write_examples(iter([]), tmp_path, plan={"task": "a"}, name="a") == report
    with pytest.raises(ConfigError, match="task was 'a', is 'b'"):
        write_examples(iter([example]), tmp_path, plan={"task": "b"}, name="a")


def test_dropped_chats_are_placed_in_files_of_any_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines count from the beginning of the file, over all of its tasks."""
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "nobody", "content": "a"}]}
    lines = [json.dumps(good), "", json.dumps(bad), "{", json.dumps(good), json.dumps(bad), ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text(json.dumps([good, bad]))
    parquet.write_table(
        pyarrow.Table.from_pylist([good, good, bad]), tmp_path / "c.parquet", row_group_size=2
    )
    monkeypatch.setattr(record_tasks, "STRETCH_BYTES", 100)
    monkeypatch.setattr(record_tasks, "RECORDS_PER_TASK", 1)
    inputs = [tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet")]
    report = prepare_chats(inputs, tmp_path / "out", converts=default_converts(), settings={})
    assert report["dropped"] == {"bad_json": 1, "unknown_role": 4}
    dropped = map(json.loads, (tmp_path / "out" / "dropped.jsonl").read_text().splitlines())
    assert sorted(dropped, key=str) == sorted(
        [
            {"cause": "bad_json", "file": "a.jsonl", "line": 4},
            {"cause": "unknown_role", "file": "a.jsonl", "line": 3},
            {"cause": "unknown_role", "file": "a.jsonl", "line": 6},
            {"cause": "unknown_role", "file": "b.json", "record": 1},
            {"cause": "unknown_role", "file": "c.parquet", "row_group": 1, "row": 0},
        ],
        key=str,
    )
