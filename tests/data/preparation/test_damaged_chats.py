"""Chat files that are damaged, by seed: records become examples or are left out by a cause, and no more."""

from __future__ import annotations

import base64
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metalm.data.documents.example import Example
from metalm.data.documents.example_members import members_of, read_example
from metalm.data.preparation.chat_shards import ChatForm
from metalm.data.preparation.example_shards import default_converts
from metalm.data.preparation.record_tasks import record_tasks
from metalm.errors import BadSample
from mutations import mutate_bytes, mutate_value

MUTATED_RECORDS = 400
MUTATED_FILES = 100


@pytest.fixture(scope="module")
def records(jpeg: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A folder of images, and a record of each form."""
    folder, data = tmp_path_factory.mktemp("chats"), jpeg((200, 30, 30))
    (folder / "fox.jpg").write_bytes(data)
    uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    image = [{"type": "image", "image": "fox.jpg"}, {"type": "text", "text": "What is it?"}]
    linked = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "And this?"}]
    return folder, [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": image},
                {"role": "assistant", "content": "A fox."},
                {"role": "user", "content": linked},
                {"role": "assistant", "content": "The same."},
            ]
        },
        {
            "image": "fox.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A fox."},
            ],
        },
        {"instruction": "Say a colour.", "input": "Of foxes.", "output": "Red."},
    ]


def test_sound_records_become_examples(records: tuple[Path, list[Any]]) -> None:
    folder, sound = records
    assert all(isinstance(ChatForm(folder, "all").examples(record)[0], Example) for record in sound)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_records(seed: int, records: tuple[Path, list[Any]]) -> None:
    folder, sound = records
    chance, form, converts = random.Random(seed), ChatForm(folder, "all"), default_converts()
    kept = 0
    for number in range(MUTATED_RECORDS):
        [example] = form.examples(mutate_value(sound[number % len(sound)], chance))
        if isinstance(example, str):
            assert example.replace("_", "").isalpha()
            continue
        try:
            members_of(example, converts)
            kept += 1
        except BadSample:
            pass
    assert 0 < kept < MUTATED_RECORDS


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files(seed: int, records: tuple[Path, list[Any]], tmp_path: Path) -> None:
    folder, sound = records
    chance, path = random.Random(seed), tmp_path / "chats.jsonl"
    whole = "".join(json.dumps(record) + "\n" for record in sound).encode()
    for _ in range(MUTATED_FILES):
        path.write_bytes(mutate_bytes(whole, chance))
        for task in record_tasks(0, path, ChatForm(folder, "all")):
            assert all(isinstance(one.example, (Example, str, type(None))) for one in task.examples())


@pytest.mark.parametrize("seed", range(2))
def test_damaged_samples_of_shards(seed: int, records: tuple[Path, list[Any]]) -> None:
    folder, sound = records
    chance, form = random.Random(seed), ChatForm(folder, "all")
    examples = [one for record in sound if isinstance(one := form.examples(record)[0], Example)]
    members = [members_of(example, default_converts()) for example in examples]
    kept = 0
    for number in range(MUTATED_RECORDS):
        whole = members[number % len(members)]
        description = json.dumps(mutate_value(json.loads(whole["json"]), chance)).encode()
        if number % 2:
            description = mutate_bytes(whole["json"], chance)
        try:
            read_example(memoryview(packed(whole | {"json": description})))
            kept += 1
        except BadSample as bad:
            assert bad.cause
    assert 0 < kept < MUTATED_RECORDS


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for suffix, content in members.items():
            entry = tarfile.TarInfo(f"0.{suffix}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
