"""The cache of the shipped model, by either of its names: what is generated with it is what a loop without it
gives, however a prompt begins and however its tokens are drawn."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from metalm.conversion.shipped.configuration_metalm import MetaLMConfig
from metalm.conversion.shipped.modeling_metalm import CACHE_NAME, MetaLMForConditionalGeneration

IMAGE_ID, PAD_ID, NEW_TOKENS = 3, 4, 20
TEXT, VISION = 1, 2  # places of the encoders
WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}

Span = tuple[int, list[int]]
PROMPTS: dict[str, list[int | Span]] = {
    "text": [0, 20, 21, 22, 20, 21],
    "a span of one token first": [(TEXT, [21]), 9, 20],
    "a span of several tokens first": [(TEXT, [20, 21, 22]), 9],
    "a span behind <s>": [0, (TEXT, [20, 21]), (TEXT, [22]), 9, 30],
    "an image first": [(VISION, [IMAGE_ID] * 4), 9, 31],
    "an image and its text first": [(VISION, [IMAGE_ID] * 4 + [40, 41]), (TEXT, [50]), 12],
}


def prompt(parts: list[int | Span]) -> dict[str, Tensor]:
    """The model's inputs, [1, S] each; an image is random, but always the same."""
    columns: list[tuple[int, int, int, int]] = []
    for number, part in enumerate(parts, start=1):
        if isinstance(part, int):
            columns.append((part, PAD_ID, 0, 0))
        else:
            columns += [(IMAGE_ID, token, part[0], number) for token in part[1]]
    names = ("input_ids", "span_input_ids", "span_encoders", "span_numbers")
    inputs = dict(zip(names, torch.tensor(columns).T[:, None], strict=True))
    if any(isinstance(part, tuple) and part[0] == VISION for part in parts):
        inputs["pixel_values"] = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(9)) * 2 - 1
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


def left_padded(prompts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    width = max(one["input_ids"].shape[1] for one in prompts)
    batch = {}
    for name in ("input_ids", "span_input_ids", "span_encoders", "span_numbers", "attention_mask"):
        filler = PAD_ID if name.endswith("input_ids") else 0
        rows = [
            torch.nn.functional.pad(one[name], (width - one[name].shape[1], 0), value=filler)
            for one in prompts
        ]
        batch[name] = torch.cat(rows)
    return batch | {
        "pixel_values": torch.cat([one["pixel_values"] for one in prompts if "pixel_values" in one])
    }


@pytest.fixture(params=["causal", "bidirectional"], scope="module")
def model(request: pytest.FixtureRequest) -> MetaLMForConditionalGeneration:
    """With weights so large that what it says depends on all of the prompt."""
    text = {"max_text_positions": 16}
    config = MetaLMConfig(
        vocab_size=300,
        num_hidden_layers=3,
        normalization="pre_ln",
        norm="rms_norm",
        positions="rope",
        scale_embedding=False,
        encoders={"text": text, "vision": text | {"image_size": 16, "patch_size": 8}},
        image_encoder="vision",
        image_token_id=IMAGE_ID,
        eos_token_id=None,
        tie_word_embeddings=False,
        spans=request.param,
    )
    torch.manual_seed(4)
    model = MetaLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.4 * torch.randn(parameter.shape)
    return model


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def loop(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """The most likely token, one after the other, each by a forward of the whole prefix without a cache."""
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        grown = {name: value for name, value in inputs.items() if name == "pixel_values"}
        for name, filler in (("input_ids", None), ("span_input_ids", PAD_ID), ("attention_mask", 1)):
            later = tokens if filler is None else [filler] * len(tokens)
            grown[name] = torch.cat((inputs[name], torch.tensor([later], dtype=torch.long)), dim=1)
        for name in ("span_encoders", "span_numbers"):
            grown[name] = torch.nn.functional.pad(inputs[name], (0, len(tokens)))
        with torch.no_grad():
            tokens.append(int(model(**grown, use_cache=False).logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("name", PROMPTS)
def test_every_way_of_caching_gives_what_a_loop_gives(model: Any, name: str) -> None:
    inputs = prompt(PROMPTS[name])
    expected = loop(model, inputs)
    assert len(set(expected)) > 3
    for way, options in WAYS.items():
        assert generate(model, inputs, **options) == [expected], way


def test_a_left_padded_batch_gives_what_a_loop_gives_each(model: Any) -> None:
    prompts = [prompt(parts) for parts in PROMPTS.values()]
    expected = [loop(model, one) for one in prompts]
    for way, options in WAYS.items():
        assert generate(model, left_padded(prompts), **options) == expected, way


@pytest.mark.parametrize("name", PROMPTS)
def test_drafted_tokens_change_nothing(model: Any, name: str) -> None:
    inputs = prompt(PROMPTS[name])
    expected = [loop(model, inputs)]
    assert generate(model, inputs, prompt_lookup_num_tokens=3) == expected
    assert generate(model, inputs, assistant_model=model) == expected


def test_the_cache_has_two_names(model: Any) -> None:
    inputs = prompt(PROMPTS["text"])
    whole = model(**inputs).logits[:, -1]
    first = {name: value[:, :-1] for name, value in inputs.items()}
    last = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": inputs["attention_mask"]}
    for name in ("cache", "past_key_values"):
        begun = model(**first, use_cache=True)
        assert torch.allclose(model(**last, **{name: begun[CACHE_NAME]}).logits[:, -1], whole, atol=1e-5)
        begun = model(**first, use_cache=True)
        fed = model.prepare_inputs_for_generation(**last, **{name: begun[CACHE_NAME]})
        assert fed[CACHE_NAME] is begun[CACHE_NAME]
        assert torch.allclose(model(**fed).logits[:, -1], whole, atol=1e-5)


def test_nothing_is_used_that_transformers_will_drop(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Its warnings of that kind are errors here; this is what it only logs."""
    logging.set_verbosity_warning()
    logging.warning_once.cache_clear()
    for options in WAYS.values():
        generate(model, prompt(PROMPTS["a span behind <s>"]), **options)
    assert "deprecated" not in capfd.readouterr().err


def test_a_deprecated_call_of_shipped_code_is_an_error() -> None:
    with pytest.raises(FutureWarning, match="old"):
        warnings.warn_explicit(
            "old", FutureWarning, "modeling_metalm.py", 1, "transformers_modules.x.modeling_metalm"
        )


def test_two_caches_are_refused(model: Any) -> None:
    inputs = prompt(PROMPTS["text"])
    both = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    for call in (model, model.model, model.generate, model.prepare_inputs_for_generation):
        with pytest.raises(ValueError, match="names of the same argument"):
            call(input_ids=inputs["input_ids"], **both)


def test_an_unknown_argument_is_refused(model: Any) -> None:
    ids = prompt(PROMPTS["text"])["input_ids"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'cash'"):
        model(input_ids=ids, cash=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cash'"):
        model.model(input_ids=ids, cash=None)
    with pytest.raises(ValueError, match="cash"):
        model.generate(input_ids=ids, cash=1, max_new_tokens=1)
