"""What the shipped model does beyond logits and generation: added tokens, compiling, image features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForMultimodalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conversion.cases import pictures
from conversion.conftest import Workshop
from conversion.test_cache import PROMPTS, model, prompt  # noqa: F401
from metalm.conversion.shipped.configuration_metalm import MetaLMConfig
from metalm.conversion.shipped.modeling_metalm import MetaLMForConditionalGeneration

KIND = "deepnorm"
NEW_TOKEN = 305
SPANNED = {
    "input_ids": torch.tensor([[0, 3, 3, 9]]),
    "span_input_ids": torch.tensor([[4, 20, NEW_TOKEN, 4]]),
    "span_encoders": torch.tensor([[0, 1, 1, 0]]),
    "span_numbers": torch.tensor([[0, 1, 1, 0]]),
}


def with_text_encoder() -> Any:
    encoders = {"text": {"max_text_positions": 16}}
    return MetaLMForConditionalGeneration(MetaLMConfig(vocab_size=300, encoders=encoders, image_token_id=3))


def test_an_added_token_is_read_by_decoder_and_encoders_and_saved(tmp_path: Path) -> None:
    small = with_text_encoder().eval()
    before = small.model.encoders["text"].token_embedding.weight.clone()
    small.resize_token_embeddings(308)
    assert torch.equal(small.model.encoders["text"].token_embedding.weight[:300], before)
    assert small.config.encoder_vocab_size == 308
    small.save_pretrained(tmp_path)
    again = MetaLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    for inputs in (SPANNED, {"input_ids": torch.tensor([[0, 20, NEW_TOKEN, 9]])}):
        with torch.no_grad():
            logits = small(**inputs).logits
            assert logits.shape[-1] == 308
            assert torch.equal(again(**inputs).logits, logits)


def test_a_smaller_vocabulary_of_the_decoder_leaves_the_encoders_theirs(tmp_path: Path) -> None:
    small = with_text_encoder().eval()
    small.resize_token_embeddings(280)
    inputs = SPANNED | {"span_input_ids": torch.tensor([[4, 20, 299, 4]])}
    small.save_pretrained(tmp_path)
    again = MetaLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = small(**inputs).logits
        assert logits.shape[-1] == 280
        assert torch.equal(again(**inputs).logits, logits)


def test_added_tokens_do_not_move_those_of_an_encoders_own_tokenizer(tmp_path: Path) -> None:
    """What the processor adds to them is written before tokens are added."""
    definition = {
        "model_type": "bert",
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 24,
    }
    encoders = {"own": {"max_text_positions": 16, "hidden_size": 16, "pretrained": definition}}
    config = MetaLMConfig(vocab_size=300, encoders=encoders, image_token_id=3)
    bert = MetaLMForConditionalGeneration(config).eval()
    inputs = SPANNED | {"span_input_ids": torch.tensor([[4, 307, 320, 4]])}
    with torch.no_grad():
        expected = bert(**inputs).logits
        bert.resize_token_embeddings(308)
        assert torch.allclose(bert(**inputs).logits[..., :300], expected, atol=1e-6)
        bert.save_pretrained(tmp_path)
        again = MetaLMForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.allclose(again(**inputs).logits[..., :300], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["text", "a span behind <s>", "an image and its text first"])
def test_the_docking_compiles_to_one_graph(model: Any, name: str) -> None:  # noqa: F811
    inputs = prompt(PROMPTS[name])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits = compiled(**inputs, use_cache=False).logits
        torch.testing.assert_close(logits, model(**inputs, use_cache=False).logits, atol=1e-4, rtol=0)


def test_an_image_for_an_encoder_of_text_is_refused(model: Any) -> None:  # noqa: F811
    inputs = prompt(PROMPTS["an image first"])
    inputs["span_encoders"] = inputs["span_encoders"].clamp(max=1)
    with pytest.raises(ValueError, match="encoder that reads no images"):
        model(**inputs)


def test_features_of_an_image_are_what_is_docked(model: Any) -> None:  # noqa: F811
    inputs = prompt(PROMPTS["an image first"])
    docked = []
    encoder = model.model.encoders["vision"]
    hook = encoder.register_forward_hook(lambda module, given, vectors: docked.append(vectors))
    with torch.no_grad():
        model(**inputs)
        features = model.get_image_features(inputs["pixel_values"])
    hook.remove()
    assert torch.equal(features.pooler_output, docked[0])
    with pytest.raises(ValueError, match="no image encoder"):
        with_text_encoder().get_image_features(inputs["pixel_values"])


def image_processor(folder: Path) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    except ImportError:  # older versions ask for torchvision, whatever the class
        name = json.loads((folder / "preprocessor_config.json").read_text())["auto_map"]["AutoImageProcessor"]
        return get_class_from_dynamic_module(name, folder).from_pretrained(folder)


def test_auto_classes_find_model_and_image_processor(workshop: Workshop, tmp_path: Path) -> None:
    folder, processor = workshop.exported(KIND), workshop.processor(KIND)
    found = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(found).__name__ == "MetaLMForConditionalGeneration"
    pixels = processor(text="<image>" * 3, images=pictures())["pixel_values"]
    processor.save_pretrained(tmp_path)
    for place in (folder, tmp_path):
        images = image_processor(place)
        assert torch.equal(images(pictures())["pixel_values"], pixels)
