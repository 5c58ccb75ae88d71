"""Checkpoints of real multi-rank training: the exported model says what the engines said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from conversion.cases import PROMPTS, prompt_images, prompt_text
from conversion.conftest import Workshop
from distributed.ranks import run_ranks
from metalm.conversion.export import export_checkpoint

LAYOUTS = [  # kind of the model, tensor and data size, ZeRO stages of decoder and encoders
    ("llama", 2, 2, 3, 3),
    ("deepnorm", 4, 1, 1, 2),
    ("mixed", 1, 2, 2, 1),
]


@pytest.mark.parametrize(("kind", "tensor", "data", "decoder", "encoders"), LAYOUTS)
def test_logits_are_those_of_the_engines(
    workshop: Workshop, tmp_path: Path, kind: str, tensor: int, data: int, decoder: int, encoders: int
) -> None:
    run = tmp_path / "run"
    arguments = [str(argument) for argument in (workshop.tokenizer_folder, kind, tensor, decoder, encoders)]
    (result,) = run_ranks("train_and_answer", tensor * data, str(run), *arguments)
    assert result["losses"][-1] < result["losses"][0] - 0.01
    expected = load_file(run / "logits.safetensors")

    exported = export_checkpoint(run, tmp_path / "out")
    assert exported.largest_difference is not None and exported.largest_difference < 1e-4
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for name, parts in PROMPTS.items():
        inputs = processor(text=prompt_text(parts), images=prompt_images(parts) or None)
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        torch.testing.assert_close(logits, expected[name], atol=1e-4, rtol=0, msg=name)
