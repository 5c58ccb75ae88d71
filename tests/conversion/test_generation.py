"""Generation with the exported model: every way of asking gives the training model's own answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, StoppingCriteria, TextIteratorStreamer

from conversion.cases import NEW_TOKENS, PROMPTS, prompt_images, prompt_text

NAMES = tuple(PROMPTS)


def inputs_of(processor: Any, *names: str) -> Any:
    images = [prompt_images(PROMPTS[name]) for name in names]
    return processor(text=[prompt_text(PROMPTS[name]) for name in names], images=images)


def generate(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    """The new tokens, [rows, at most NEW_TOKENS]."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def assert_continues(generated: torch.Tensor, expected: list[int], pad_id: int) -> None:
    tokens = generated.tolist()
    assert tokens[: len(expected)] == expected
    assert all(token == pad_id for token in tokens[len(expected) :])


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_greedy_is_the_training_models_argmax(hf_model, processor, training_model, cache) -> None:
    for name in NAMES:
        generated = generate(hf_model, inputs_of(processor, name), **cache)
        assert_continues(generated[0], training_model.greedy[name], hf_model.config.pad_token_id)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_a_left_padded_batch_gives_the_same(hf_model, processor, training_model, cache) -> None:
    inputs = inputs_of(processor, *NAMES)
    assert not inputs["attention_mask"].all()
    generated = generate(hf_model, inputs, **cache)
    for row, name in enumerate(NAMES):
        assert_continues(generated[row], training_model.greedy[name], hf_model.config.pad_token_id)


def test_beams_give_the_same_with_and_without_cache_batched_and_single(hf_model, processor) -> None:
    options = {"num_beams": 3, "max_new_tokens": 12, "length_penalty": 0.6}
    batched = generate(hf_model, inputs_of(processor, *NAMES), **options)
    uncached = generate(hf_model, inputs_of(processor, *NAMES), use_cache=False, **options)
    assert torch.equal(batched, uncached)
    for row, name in enumerate(NAMES):
        single = generate(hf_model, inputs_of(processor, name), **options)[0].tolist()
        assert_continues(batched[row], single, hf_model.config.pad_token_id)


def test_samples_of_a_prompt_see_its_images(hf_model, processor) -> None:
    """Repeated rows are the row with its own images: at temperature 0 they all say the same."""
    options = {
        "do_sample": True,
        "temperature": 1e-4,
        "top_k": 1,
        "num_return_sequences": 2,
        "max_new_tokens": 8,
    }
    generated = generate(hf_model, inputs_of(processor, *NAMES), **options)
    greedy = generate(hf_model, inputs_of(processor, *NAMES), max_new_tokens=8)
    assert torch.equal(generated[::2], greedy)
    assert torch.equal(generated[1::2], greedy)


def test_streaming_tells_the_text_as_it_comes(hf_model, processor) -> None:
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=10)
    generated = generate(hf_model, inputs_of(processor, "image"), streamer=streamer, max_new_tokens=16)
    assert "".join(streamer) == processor.decode(generated[0])


def test_a_conversation_goes_on_from_its_cache(hf_model, processor) -> None:
    """A second turn with a new image gives what the whole conversation gives without the cache."""
    first = inputs_of(processor, "image and prefix")
    begun = hf_model.generate(
        **first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, eos_token_id=None
    )
    turn = inputs_of(processor, "images and spans")
    whole: dict[str, torch.Tensor] = {}
    for key in first:
        if key == "pixel_values":
            whole[key] = torch.cat((first[key], turn[key]))
            continue
        middle = begun.sequences[:, first["input_ids"].shape[1] :]
        if key != "input_ids":
            middle = torch.ones_like(middle) if key == "attention_mask" else torch.zeros_like(middle)
        later = turn[key] + (turn[key] > 0) * 10 if key == "span_numbers" else turn[key]
        whole[key] = torch.cat((first[key], middle, later), dim=1)
    # Its name depends on the version of transformers.
    made = begun["cache"] if "cache" in begun else begun["past_key_values"]
    for name in ("cache", "past_key_values"):
        continued = generate(hf_model, whole, **{name: copy.deepcopy(made)}, max_new_tokens=12)
        assert torch.equal(continued, generate(hf_model, whole, max_new_tokens=12))


def test_images_alone_need_no_span_tensors(hf_model, processor) -> None:
    """Runs of image tokens are images, and beams keep them apart."""
    spelt = inputs_of(processor, "image", "text")
    plain = {key: spelt[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    for options in ({}, {"use_cache": False}, {"num_beams": 2}):
        options = options | {"max_new_tokens": 8}
        assert torch.equal(generate(hf_model, plain, **options), generate(hf_model, spelt, **options))


def test_images_are_found_among_embeddings(hf_model, processor) -> None:
    spelt = inputs_of(processor, "image", "image")
    embeds = hf_model.get_input_embeddings()(spelt["input_ids"])
    given = {"inputs_embeds": embeds, "pixel_values": spelt["pixel_values"]}
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = generate(hf_model, spelt, **options)
    assert torch.equal(hf_model.generate(**given, **options), expected)


def test_a_model_that_accelerate_places_says_the_same(hf_model, processor, kind, workshop) -> None:
    pytest.importorskip("accelerate")
    placed = AutoModelForImageTextToText.from_pretrained(
        workshop.exported(kind), trust_remote_code=True, device_map="auto"
    )
    inputs = inputs_of(processor, "images and spans")
    expected = generate(hf_model, inputs, max_new_tokens=8)
    assert torch.equal(generate(placed, inputs.to(placed.device), max_new_tokens=8).cpu(), expected.cpu())


def test_spans_are_encoded_once(hf_model, processor) -> None:
    """With a cache, the encoders run for the prompt only."""
    calls = []

    class Count(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            calls.append("step")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    encoder = hf_model.model.encoders["vision"]
    hook = encoder.register_forward_hook(lambda *unused: calls.append("encoded"))
    generate(hf_model, inputs_of(processor, "image"), max_new_tokens=4, stopping_criteria=[Count()])
    hook.remove()
    assert calls == ["encoded", "step", "step", "step", "step"]
