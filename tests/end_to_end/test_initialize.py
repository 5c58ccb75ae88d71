"""Runs that start from the weights of another run's checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed.ranks import run_program
from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.reader import CheckpointReader
from tiny_pipeline import REPOSITORY

STILL = ("training.steps=1", "training.schedule.warmup_steps=0", "training.optimizer.learning_rate=1.0e-12")
MORE_ENCODERS = (
    "model.encoders.extra={num_layers: 1, hidden_size: 16, num_heads: 2, max_text_positions: 16}",
)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def train(data: Path, runs: Path, name: str, *overrides: str) -> tuple[int, str]:
    start = ["-m", "metalm", "train", str(data / "tiny.yaml"), "data.evaluation=null"]
    return run_program([*start, f"run.folder={runs}", f"run.name={name}", *overrides], timeout_s=200)


@pytest.fixture(scope="module")
def source(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("source")
    code, output = train(tiny_data, runs, "source", "training.steps=3")
    assert code == 0, output
    return runs / "source"


def test_a_component_starts_from_a_checkpoint_and_new_parts_from_scratch(
    tiny_data: Path, source: Path, tmp_path: Path
) -> None:
    both = (f"initialize.decoder={source}", f"initialize.encoders={find_checkpoint(source)}")
    code, output = train(tiny_data, tmp_path, "grown", *both, *STILL, *MORE_ENCODERS)
    assert code == 65, output
    assert "lacks 16 parameter(s), such as encoders.extra." in output
    assert not (tmp_path / "grown" / "checkpoints" / "latest").exists()
    code, output = train(
        tiny_data, tmp_path, "grown", *both, *STILL, *MORE_ENCODERS, "initialize.new=['encoders.extra.*']"
    )
    assert code == 0, output
    before, after = (CheckpointReader(find_checkpoint(run)) for run in (source, tmp_path / "grown"))
    assert after.state.optimizer_steps == {"decoder": 1.0, "encoders": 1.0}
    new = set()
    for component in ("decoder", "encoders"):
        for name in after.parameters(component):
            if name not in before.parameters(component):
                new.add(name.split(".")[1])
                continue
            torch.testing.assert_close(
                after.read(component, name), before.read(component, name), atol=1e-9, rtol=0
            )
    assert new == {"extra"}


def test_one_component_may_start_from_scratch(tiny_data: Path, source: Path, tmp_path: Path) -> None:
    code, output = train(tiny_data, tmp_path, "decoder", f"initialize.decoder={source}", *STILL)
    assert code == 0, output
    before, after = (CheckpointReader(find_checkpoint(run)) for run in (source, tmp_path / "decoder"))
    name = "gpt.embedding.word_embeddings.weight"
    torch.testing.assert_close(after.read("decoder", name), before.read("decoder", name), atol=1e-9, rtol=0)
    name = "encoders.text.token_embedding.weight"
    assert not torch.allclose(after.read("encoders", name), before.read("encoders", name))


def test_a_run_that_goes_on_from_another_needs_steps_beyond_it(
    tiny_data: Path, source: Path, tmp_path: Path
) -> None:
    words = (f"initialize.run={source}", "training.schedule.warmup_steps=0")
    code, output = train(tiny_data, tmp_path, "none", *words, "training.steps=3")
    assert (code, "Traceback" in output) == (64, False), output
    assert "training.steps = 3 leaves nothing to train: initialize.run goes on from step 3" in output
    for more, message, expected in (
        (("training.steps=3",), "training.steps = 3 leaves nothing to train", 64),
        (("training.steps=4", "model.decoder.hidden_size=64"), "is of another model than the config's", 64),
        (("training.steps=4", "checkpoint.resume=required"), "checkpoint.resume is `required`", 65),
    ):  # a dry run says what the start would
        code, output = train(tiny_data, tmp_path, "none", *words, *more, "--dry-run")
        assert (code, message in output, "Traceback" in output) == (expected, True, False), output
    code, output = train(tiny_data, tmp_path, "one", *words, "training.steps=4")
    assert code == 0, output


def test_what_cannot_be_started_from_is_refused(tiny_data: Path, source: Path, tmp_path: Path) -> None:
    for overrides, message in (
        ((f"initialize.decoder={tmp_path}",), "neither a checkpoint nor a run folder"),
        ((f"initialize.decoder={source}", "model.decoder.hidden_size=64"), "the model needs"),
        (("checkpoint.resume=required",), "checkpoint.resume is `required`"),
    ):
        code, output = train(tiny_data, tmp_path, "refused", *overrides, *STILL)
        assert (code, message in output, "Traceback" in output) == (65, True, False), output
