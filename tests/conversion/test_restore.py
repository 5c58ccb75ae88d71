"""Entering: an exported folder becomes the first checkpoint of a run, and leaves again the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from conversion.cases import run_config
from conversion.conftest import Workshop, configs_and_weights
from metalm.checkpoint.reader import CheckpointReader
from metalm.config import RunConfig
from metalm.conversion.export import export_checkpoint
from metalm.conversion.restore import FolderWeights, restore_checkpoint
from metalm.data.tokenizer import train_tokenizer
from metalm.errors import CheckpointError, ConfigError, DataError


def further(workshop: Workshop, kind: str, folder: Path, **model: object) -> RunConfig:
    config = run_config(kind, workshop.tokenizer_folder)
    run = config.run.model_copy(update={"folder": folder, "name": "further"})
    return config.model_copy(update={"run": run, "model": config.model.model_copy(update=model)})


def test_there_and_back_again_gives_the_same_bytes(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    exported = workshop.exported(kind)
    restore_checkpoint(exported, further(workshop, kind, tmp_path))
    export_checkpoint(tmp_path / "further", tmp_path / "again", max_shard_bytes=50_000, with_proof=False)
    assert configs_and_weights(tmp_path / "again") == configs_and_weights(exported)


def test_masters_come_back_and_moments_start_at_zero(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    checkpoint = restore_checkpoint(workshop.exported(kind), further(workshop, kind, tmp_path))
    reader = CheckpointReader(checkpoint, verify=True)
    vocabulary = run_config(kind, workshop.tokenizer_folder).model.vocab_size
    for component, parameters in workshop.training_model(kind).parameters.items():
        assert reader.parameters(component).keys() == parameters.keys()
        for name, expected in parameters.items():
            found = reader.read(component, name)
            if name.endswith(("word_embeddings.weight", "token_embedding.weight", "output_layer.weight")):
                expected = torch.cat((expected[:vocabulary], torch.zeros_like(expected[vocabulary:])))
            assert torch.equal(found, expected)
            assert not reader.read(component, name, "exp_avg").any()
            assert not reader.read(component, name, "exp_avg_sq").any()


def test_a_model_saved_by_transformers_comes_back(workshop: Workshop, tmp_path: Path) -> None:
    kind = "pre_ln"
    workshop.hf_model(kind).save_pretrained(tmp_path / "saved")
    workshop.processor(kind).save_pretrained(tmp_path / "saved")
    restore_checkpoint(tmp_path / "saved", further(workshop, kind, tmp_path))
    export_checkpoint(tmp_path / "further", tmp_path / "again", max_shard_bytes=50_000, with_proof=False)
    for path in workshop.exported(kind).glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_another_model_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    config = further(workshop, "deepnorm", tmp_path, vocab_size=331)
    with pytest.raises(ConfigError, match="vocab_size: 330 in the folder, 331 in the run"):
        restore_checkpoint(workshop.exported("deepnorm"), config)
    assert not (tmp_path / "further").exists()


def test_another_tokenizer_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    config = further(workshop, "deepnorm", tmp_path)
    train_tokenizer(["other words than those"], 300, tmp_path / "other")
    data = config.data.model_copy(update={"tokenizer": tmp_path / "other"})
    with pytest.raises(DataError, match="its ids mean other tokens"):
        restore_checkpoint(workshop.exported("deepnorm"), config.model_copy(update={"data": data}))
    assert not (tmp_path / "further").exists()


def test_a_folder_without_all_weights_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.exported("deepnorm"), tmp_path / "exported")
    next((tmp_path / "exported").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore_checkpoint(tmp_path / "exported", further(workshop, "deepnorm", tmp_path))
    assert not (tmp_path / "further").exists()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", ""])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": file}}))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        FolderWeights(tmp_path)


def test_a_run_that_cannot_be_written_is_refused_before_the_folder_is_read(
    workshop: Workshop, tmp_path: Path
) -> None:
    config = further(workshop, "deepnorm", Path("/proc/none"))
    with pytest.raises(
        ConfigError, match="/proc/none/further cannot be written: .*; choose another run.fold"
    ):
        restore_checkpoint(tmp_path, config)


def test_a_run_with_checkpoints_is_not_touched(workshop: Workshop, tmp_path: Path) -> None:
    config = further(workshop, "deepnorm", tmp_path)
    checkpoint = restore_checkpoint(workshop.exported("deepnorm"), config)
    with pytest.raises(ConfigError, match="has checkpoints already"):
        restore_checkpoint(workshop.exported("deepnorm"), config)
    CheckpointReader(checkpoint, verify=True)
