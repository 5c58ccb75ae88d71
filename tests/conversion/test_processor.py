"""The exported processor: images as in training, markers, and mistakes."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from PIL import Image
from transformers import AutoProcessor

from conversion.cases import PROMPTS, pictures, prompt_images, prompt_row, prompt_text, run_config
from conversion.conftest import Workshop
from metalm.modalities.image import decode_image

SIDE = 16
KIND = "deepnorm"


@pytest.fixture
def processor(workshop: Workshop) -> Any:
    return workshop.processor(KIND)


def image_file(mode: str, format_name: str, size: tuple[int, int] = (70, 45)) -> bytes:
    draw = np.random.default_rng(9)
    noise = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8), "RGBA")
    buffer = io.BytesIO()
    noise.convert(mode).save(buffer, format_name)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "format_name"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
    ],
)
def test_pixels_are_those_of_training(processor, tmp_path: Path, mode: str, format_name: str) -> None:
    data = image_file(mode, format_name)
    expected = torch.from_numpy(decode_image(data, image_size=SIDE).copy()).permute(2, 0, 1)
    path = tmp_path / "image"
    path.write_bytes(data)
    for given in (data, path, str(path)):
        pixels = processor(text="<image>", images=[given])["pixel_values"][0]
        assert pixels.dtype == torch.float32
        assert torch.equal(((pixels + 1.0) * 127.5).round().to(torch.uint8), expected)
        assert torch.equal(pixels, expected.float() / 127.5 - 1.0)


def test_open_images_and_arrays_are_prepared_alike(processor) -> None:
    data = image_file("RGBA", "PNG")
    expected = processor(text="<image>", images=[data])["pixel_values"]
    opened = Image.open(io.BytesIO(data))
    assert torch.equal(processor(text="<image>", images=opened)["pixel_values"], expected)
    assert opened.size == (70, 45)
    array = np.asarray(opened)
    assert torch.equal(processor(text="<image>", images=[array])["pixel_values"], expected)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_the_rows_of_training(processor, workshop, tokenizer, name: str) -> None:
    config = run_config(KIND, workshop.tokenizer_folder)
    row = prompt_row(PROMPTS[name], tokenizer, config)
    inputs = processor(text=prompt_text(PROMPTS[name]), images=prompt_images(PROMPTS[name]) or None)
    ids = inputs["input_ids"][0].numpy().copy()
    if "span_numbers" in inputs:
        docked = inputs["span_numbers"][0].numpy() > 0
        assert (ids[docked] == tokenizer.image_id).all()
        read = inputs["span_input_ids"][0].numpy()
        ids[docked] = np.where(read == tokenizer.image_id, tokenizer.paragraph_id, read)[docked]
        for place, encoder in enumerate(sorted(config.model.encoders), start=1):
            bounds = row.spans[encoder].bounds if encoder in row.spans else []
            expected = [position for start, end in bounds for position in range(start, end)]
            assert np.flatnonzero(inputs["span_encoders"][0] == place).tolist() == expected
    assert ids.tolist() == row.tokens.tolist()


def test_images_are_given_to_prompts_in_order_or_by_prompt(processor) -> None:
    first, second, third = pictures()
    texts = ["<image> and <image>", "none", "<span><image>the fox</span>"]
    flat = processor(text=texts, images=[first, second, third])
    nested = processor(text=texts, images=[[first, second], [], [third]])
    assert torch.equal(flat["pixel_values"], nested["pixel_values"])
    assert flat["pixel_values"].shape == (3, 3, SIDE, SIDE)


def test_a_conversation_encodes_each_turn_of_the_user(processor) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": pictures()[0]}, {"type": "text", "text": "fox"}],
        },
        {"role": "assistant", "content": "brown"},
        {"role": "user", "content": "the dog"},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<span><image>fox</span>brown\n\n<span>the dog</span>"
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    same = processor(text=prompt, images=[pictures()[0]])
    for key in same:
        assert torch.equal(torch.as_tensor(inputs[key]), same[key])


MARKS = ["<span>", "</span>", "<span:text>", "<image>", "<s>", "</d>", "<|>"]


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
@hypothesis.given(strategies.lists(strategies.sampled_from([*MARKS, "\\", "fox", "\n\n", " "])).map("".join))
def test_an_escaped_text_is_the_text(processor, tokenizer, text: str) -> None:
    ids = processor(text=processor.escape(text))["input_ids"][0].tolist()
    assert ids == [tokenizer.start_id, *tokenizer.encode([text])[0].tolist()]


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None)
@hypothesis.given(
    strategies.lists(strategies.sampled_from([*MARKS, "\\", "fox", " "]), min_size=1).map("".join)
)
def test_an_escaped_text_is_the_text_whatever_follows(processor, tokenizer, text: str) -> None:
    escaped = processor.escape(text)
    ids = tokenizer.encode([text])[0].tolist()[:12]
    if len(tokenizer.encode([text])[0]) <= 12:
        span = processor(text=f"<span>{escaped}</span>dog")
        assert span["span_input_ids"][0, 1 : 1 + len(ids)].tolist() == ids
    whole = processor(text=f"{escaped}\n\n<span>dog</span>")["input_ids"][0].tolist()
    assert whole[1 : 1 + len(ids)] == ids


def test_two_backslashes_before_a_marker_are_one(processor) -> None:
    words = processor(text="fox\\")["input_ids"][0]
    ids = processor(text=r"fox\\<image>", images=pictures()[:1])["input_ids"][0]
    assert torch.equal(ids[: len(words)], words)
    assert (ids[len(words) :] == processor.image_token_id).sum() == len(ids) - len(words) == 4


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image>", 0, r"prompts have 1 image marker\(s\), 0 image"),
        ("fox", 1, r"prompts have 0 image marker\(s\), 1 image"),
        ("<span>fox", 0, "<span> has no counterpart"),
        ("<span>a<span>b</span></span>", 0, "spans do not nest"),
        ("<span></span>", 0, "a span is empty"),
        ("<span>fox<image></span>", 1, "one image comes first"),
        ("<span:nobody>fox</span>", 0, "no encoder 'nobody'.*text, vision"),
        ("<span:text><image></span>", 1, "'text' reads no images"),
        ("<span>the quick brown fox jumps over the lazy dog and more of it</span>", 0, "at most 12 tokens"),
    ],
)
def test_mistakes_in_prompts_are_named(processor, text: str, images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=pictures()[:images] or None)


def test_saved_again_it_is_the_same(processor, workshop, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    prompt, images = prompt_text(PROMPTS["images and spans"]), prompt_images(PROMPTS["images and spans"])
    expected, found = processor(text=prompt, images=images), again(text=prompt, images=images)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_special_tokens_that_were_added_later_are_tokens(workshop: Workshop) -> None:
    processor = copy.deepcopy(workshop.processor("deepnorm"))
    processor.tokenizer.add_tokens(["<x>", "<x>>"], special_tokens=True)
    for text in ("fox <x> dog", "<x>><x>"):
        expected = processor.tokenizer(text)["input_ids"]
        assert processor(text=text)["input_ids"].tolist()[0] == expected
        assert processor.tokenizer.convert_tokens_to_ids("<x>") in expected
