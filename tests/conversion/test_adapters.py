"""Adapters leave merged into the weights, or beside them for peft; both are the model as it trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from conversion.cases import ADAPTED, PROMPTS, prompt_images, prompt_text, run_config
from conversion.conftest import Workshop, write_run
from metalm.conversion.export import export_checkpoint
from metalm.conversion.restore import restore_checkpoint
from metalm.errors import CheckpointError, ConfigError

ASKED = ("text", "span", "images and spans")


def logits_of(model: Any, processor: Any, name: str) -> torch.Tensor:
    prompt = PROMPTS[name]
    inputs = processor(text=[prompt_text(prompt)], images=[prompt_images(prompt)])
    with torch.no_grad():
        return model(**inputs).logits[0]


@pytest.mark.parametrize("kind", ADAPTED)
def test_merged_and_beside_the_weights_in_peft_are_the_trained_model(
    kind: str, workshop: Workshop, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    trained = workshop.training_model(kind)
    run = workshop.run_folder(kind)
    result = export_checkpoint(run, tmp_path / "merged", with_proof=kind == "lora")
    export_checkpoint(run, tmp_path / "base", with_proof=False, adapter_apart=True)
    assert kind != "lora" or result.largest_difference is not None
    processor = AutoProcessor.from_pretrained(tmp_path / "base", trust_remote_code=True)
    merged, base = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
        for name in ("merged", "base")
    )
    without = {name: logits_of(base, processor, name) for name in ASKED}
    beside = peft.PeftModel.from_pretrained(base, tmp_path / "base" / "adapter").eval()
    for name in ASKED:
        expected = trained.logits[name]
        scale = expected.abs().max()
        for found in (logits_of(merged, processor, name), logits_of(beside, processor, name)):
            assert (found[:, : expected.shape[1]] - expected).abs().max() < 1e-5 * scale
        assert (without[name] - expected).abs().max() > 1e-2 * scale
    content = json.loads((tmp_path / "base" / "adapter" / "adapter_config.json").read_text())
    assert content["peft_type"] == kind.upper()


def test_a_checkpoint_without_its_adapter_or_with_a_wrong_one_is_refused(
    workshop: Workshop, tmp_path: Path
) -> None:
    model = workshop.training_model("lora")
    decoder = model.parameters["decoder"]
    factor = "gpt.decoder.layers.0.mlp.linear_fc1.lora_a"
    for name, parameters, message in (
        (
            "none",
            {n: p for n, p in decoder.items() if "lora" not in n},
            "no weights of the adapter of decoder",
        ),
        ("half", {n: p for n, p in decoder.items() if n != factor}, f"{factor}: expected shape"),
        ("wide", decoder | {factor: decoder[factor][:2]}, f"{factor}: expected shape \\[3, 32\\]"),
    ):
        changed = type(model)(model.config, model.parameters | {"decoder": parameters}, {}, {})
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(write_run(tmp_path / name, changed, tensor_size=1), tmp_path / "out")


def test_adapter_is_for_models_that_have_one_kind(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapter"):
        export_checkpoint(workshop.run_folder("deepnorm"), tmp_path / "out", adapter_apart=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_restored_beside_a_new_adapter(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="restore into a run without one"):
        restore_checkpoint(tmp_path, run_config("lora", workshop.tokenizer_folder))
