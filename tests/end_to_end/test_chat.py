"""The chat pipeline in small: it learns its chats, goes on elsewhere, and its export answers as it learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from distributed.ranks import run_program
from metalm.conversion.chat import chat_with_folder
from metalm.conversion.export import export_checkpoint
from metalm.data.preparation.chat_shards import prepare_chats
from metalm.data.preparation.example_shards import default_converts
from metalm.run_metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
CHATS = {
    "red": [("what is it?", "a red circle"), ("and above?", "nothing")],
    "blue": [("what is it?", "a blue square"), ("and above?", "a star")],
    None: [("say green", "green"), ("again", "green green")],
}


@pytest.fixture
def folder(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start in, with shards of a few chats."""
    for colour, turns in CHATS.items():
        messages = []
        for number, (asked, answer) in enumerate(turns):
            content = [{"type": "text", "text": asked}]
            if colour is not None and not number:
                Image.new("RGB", (48, 48), colour).save(tmp_path / f"{colour}.png")
                content.append({"type": "image", "image": f"{colour}.png"})
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        with (tmp_path / f"{'text' if colour is None else 'pictures'}.jsonl").open("a") as file:
            file.write(json.dumps({"messages": messages}) + "\n")
    for name in ("pictures", "text"):
        prepare_chats([tmp_path / f"{name}.jsonl"], tmp_path / name, converts=default_converts(), settings={})
    (tmp_path / "deepspeed_configs").symlink_to(REPOSITORY / "deepspeed_configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder: Path, tiny_data: Path, name: str, num_ranks: int, *overrides: str) -> dict[int, float]:
    """Train the twin in `folder/name`; its losses by step."""
    own = [f"run.folder={folder}", f"run.name={name}", "training.precision=fp32", "monitor.log_every_steps=1"]
    own += [
        f"data.tokenizer={tiny_data / 'tokenizer'}",
        "initialize.decoder=null",
        "initialize.encoders=null",
    ]
    paths = ["sources.pictures", "sources.text", "evaluation.pictures"]
    own += [f"data.{path}.path={folder / path.partition('.')[2]}" for path in paths]
    words = ["-m", "metalm", "train", str(REPOSITORY / "pipelines/chat_tiny.yaml"), *own, *overrides]
    code, output = run_program(words, num_ranks, timeout_s=250)
    assert code == 0, output
    return {entry["step"]: entry["loss/all"] for entry in read_metrics(folder / name) if "loss/all" in entry}


def test_the_twin_goes_on_elsewhere_with_the_same_losses(folder: Path, tiny_data: Path) -> None:
    short = ["training.steps=6", "checkpoint.every_steps=3", "monitor.evaluation_rows=2"]
    expected = train(folder, tiny_data, "two", 2, *short, "parallel.tensor=2")
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    first = folder / "two" / "checkpoints" / "step_00000003"
    (folder / "one" / "checkpoints").mkdir(parents=True)
    (folder / "one" / "checkpoints" / first.name).symlink_to(first)
    found = train(folder, tiny_data, "one", 1, *short, "training.micro_batch_size=8")
    assert found == pytest.approx({step: expected[step] for step in (4, 5, 6)}, abs=1e-5)


def test_the_twin_learns_its_chats_and_its_export_answers(folder: Path, tiny_data: Path) -> None:
    no_dropout = ["model.decoder.dropout=0", "model.encoders.pairs.dropout=0"]
    faster = ["training.steps=120", "training.optimizer.learning_rate=3e-3", "checkpoint.every_steps=120"]
    quiet = ["monitor.evaluate_every_steps=120", "monitor.sample_every_steps=120"]
    small = ["data.sequence_length=80", "training.global_batch_size=4", "training.micro_batch_size=4"]
    losses = train(folder, tiny_data, "run", 1, *small, *no_dropout, *faster, *quiet)
    assert losses[120] < 0.02
    held_out = [
        one["held_out/pictures"] for one in read_metrics(folder / "run") if "held_out/pictures" in one
    ]
    assert held_out[-1] < 0.02
    export_checkpoint(folder / "run", folder / "exported")
    for colour, turns in CHATS.items():
        lines = [] if colour is None else [f"/image {folder / f'{colour}.png'}"]
        said: list[str] = []
        chat_with_folder(folder / "exported", iter([*lines, *(asked for asked, _ in turns)]), said.append)
        assert said == [answer for _, answer in turns]
