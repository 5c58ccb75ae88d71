"""The exported model on this package's kernel, and where the package is not installed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from conversion.cases import PROMPTS, prompt_images, prompt_text
from conversion.conftest import Workshop
from metalm.kernels import backend_counts, reset_backend_counts

NAMES = tuple(PROMPTS)
INTERVAL = "metalm_interval"


@pytest.fixture
def interval_model(workshop: Workshop, kind: str) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(
        workshop.exported(kind), trust_remote_code=True, attn_implementation=INTERVAL
    )
    reset_backend_counts()
    return model.eval()


@pytest.fixture
def inputs(processor) -> Any:
    images = [prompt_images(PROMPTS[name]) for name in NAMES]
    return processor(text=[prompt_text(PROMPTS[name]) for name in NAMES], images=images)


def test_logits_are_the_same_and_the_kernel_ran(interval_model, hf_model, inputs) -> None:
    """In float64: these models blow up the rounding of single precision."""
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        logits = interval_model.double()(**inputs).logits
        expected = copy.deepcopy(hf_model).double()(**inputs).logits
    config = interval_model.config
    encoders = [sizes for sizes in config.encoders.values() if sizes["relative_bias"] is None]  # others: SDPA
    layers = config.num_hidden_layers + sum(sizes["num_hidden_layers"] for sizes in encoders)
    assert backend_counts() == {"tiled": layers}
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_a_padded_batch_decodes_to_the_same(interval_model, hf_model, inputs, options) -> None:
    options = {"max_new_tokens": 12, "do_sample": False} | options
    generated = interval_model.generate(**inputs, **options)
    assert backend_counts()["tiled"] > 12 * interval_model.config.num_hidden_layers
    assert torch.equal(generated, hf_model.generate(**inputs, **options))


def test_gradients_are_the_same(interval_model, hf_model, inputs) -> None:
    first = inputs["attention_mask"].cumsum(dim=1) <= 1  # what padding would predict
    labels = inputs["input_ids"].masked_fill(first, -100)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    gradients = []
    for model in (copy.deepcopy(hf_model).double(), interval_model.double()):
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-9, rtol=1e-9)


def test_without_the_package_it_is_sdpa(workshop: Workshop, tmp_path: Path) -> None:
    program = (
        "import sys\nsys.modules['metalm'] = None\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(workshop.exported('deepnorm'))!r}, "
        f"trust_remote_code=True, attn_implementation={INTERVAL!r})\n"
        "print(model.config._attn_implementation)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "sdpa\n", done.stderr
    assert "needs the metalm package" in done.stderr
