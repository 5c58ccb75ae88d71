"""The exported model beside the training model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conversion.cases import PROMPTS, prompt_images, prompt_text


def inputs_of(processor: Any, *names: str) -> Any:
    images = [prompt_images(PROMPTS[name]) for name in names]
    return processor(text=[prompt_text(PROMPTS[name]) for name in names], images=images)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_the_training_model(hf_model, processor, training_model, name: str) -> None:
    with torch.no_grad():
        logits = hf_model(**inputs_of(processor, name)).logits[0]
    assert logits.shape == training_model.logits[name].shape
    torch.testing.assert_close(logits, training_model.logits[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_do_not_depend_on_batch_or_padding(hf_model, processor, training_model, side: str) -> None:
    texts = [prompt_text(parts) for parts in PROMPTS.values()]
    images = [prompt_images(parts) for parts in PROMPTS.values()]
    inputs = processor(text=texts, images=images, padding_side=side)
    with torch.no_grad():
        logits = hf_model(**inputs).logits
    for row, name in enumerate(PROMPTS):
        own = logits[row, inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(own, training_model.logits[name], atol=1e-4, rtol=0)
