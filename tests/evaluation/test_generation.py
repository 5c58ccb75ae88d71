"""Samples that are shown are asked about with what training would have read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from metalm.config.schema import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.lanes import Lane, Mixture
from metalm.data.preparation.example_shards import write_examples
from metalm.data.row import Row
from metalm.data.storage.index import build_index
from metalm.data.tokenizer import Tokenizer
from metalm.evaluation import generation
from metalm.evaluation.generation import (
    TEXT_PROMPT_TOKENS,
    EvaluatedModel,
    Sample,
    evaluating,
    generate_samples,
)

NEW_TOKENS = 4


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig, str], tuple[list[Sample], list[Row]]]:
    """The samples of a held-out source, and the prompts that the model is given; it answers with `answer`."""

    def run(config: RunConfig, name: str) -> tuple[list[Sample], list[Row]]:
        prompts: list[Row] = []

        def answer(*arguments: Any) -> list[list[int]]:
            *_, tokenizer, asked, max_new_tokens = arguments
            assert max_new_tokens == NEW_TOKENS
            prompts.extend(asked)
            return [tokenizer.encode([f"answer {len(prompt.tokens)}"])[0].tolist() for prompt in asked]

        monkeypatch.setattr(generation, "generate_greedily", answer)
        corpus = Corpus(config)
        model: Any = None
        return generate_samples(model, model, corpus, corpus.held_out[name], 9, NEW_TOKENS), prompts

    return run


def photograph(seed: int) -> bytes:
    """A JPEG much larger than what the encoder sees, so that its way of decoding matters."""
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 130, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def test_training_mode_comes_back_after_an_error() -> None:
    component = torch.nn.Dropout()
    model = cast(EvaluatedModel, SimpleNamespace(by_component=lambda: {"decoder": component}))
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not component.training
        raise ZeroDivisionError
    assert component.training


@pytest.mark.parametrize("prefixes", [True, False])
def test_the_prompts_patches_are_the_training_rows(
    prefixes: bool,
    ask: Callable[[RunConfig, str], tuple[list[Sample], list[Row]]],
    make_config: Callable[..., RunConfig],
    write_shard: Callable[..., None],
    tmp_path: Path,
) -> None:
    pairs: Sequence[dict[str, bytes]] = [
        {"jpg": photograph(n), "json": json.dumps({"captions": [f"fox {n}"]}).encode()} for n in range(6)
    ]
    write_shard(tmp_path / "a.tar", pairs)
    build_index(tmp_path, kind="image_text")
    readers = {"image": "vision", **({"text": "vision"} if prefixes else {})}
    source = {"scenes": {"path": tmp_path, "readers": readers}}
    config = make_config(source, evaluation=source)
    samples, prompts = ask(config, "scenes")
    assert [sample.reference for sample in samples] == [f"fox {n}" for n in range(6)]
    assert [sample.generated for sample in samples] == ["answer 5"] * 6
    assert all(sample.modality == "image" and sample.media.shape == (90, 130, 3) for sample in samples)

    corpus = Corpus(config)
    tokenizer, lane, trained = corpus.tokenizer, Lane(Mixture(corpus), 0), {}
    while len(trained) < 6:
        row = lane.next_row()
        patches = row.spans["vision"].media.reshape(-1, 4, 192)
        starts = [0, *row.document_ends[:-1]]
        for start, end, own in zip(starts, row.document_ends, patches, strict=True):
            trained[tokenizer.decode(row.tokens[start + 5 : end - 1])] = own
    for sample, prompt in zip(samples, prompts, strict=True):
        assert prompt.tokens.tolist() == [tokenizer.start_id, *[tokenizer.paragraph_id] * 4]
        assert prompt.spans["vision"].bounds.tolist() == [[1, 5]]
        np.testing.assert_array_equal(prompt.spans["vision"].media, trained[sample.reference])


@pytest.mark.parametrize("readers", [{"image": "vision"}, {"image": "vision", "text": "vision"}])
def test_the_question_about_an_image_is_told(
    readers: dict[str, str],
    ask: Callable[[RunConfig, str], tuple[list[Sample], list[Row]]],
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
) -> None:
    def example(number: int) -> Example:
        picture = ExamplePart(photograph(number), "image", is_encoded=True)
        question = ExamplePart(f"fox {number}?", is_encoded=True)
        return Example((picture, question, ExamplePart("answer", is_trained=True)))

    write_examples(map(example, range(3)), tmp_path / "shards", plan={})
    source = {"chats": {"path": tmp_path / "shards", "readers": readers, "overflow": "split"}}
    samples, _ = ask(make_config(source, evaluation=source), "chats")
    assert [(one.asked, one.reference) for one in samples] == [(f"fox {n}?", "answer") for n in range(3)]


@pytest.mark.parametrize("readers", [{}, {"text": "text"}])
def test_the_prompts_ids_are_those_of_the_shards(
    readers: dict[str, str],
    ask: Callable[[RunConfig, str], tuple[list[Sample], list[Row]]],
    make_config: Callable[..., RunConfig],
    text_source: Callable[..., Path],
    tokenizer: Tokenizer,
) -> None:
    folder = text_source([7])
    source = {"prose": {"path": folder, "readers": readers}}
    config = make_config(source, evaluation=source)
    samples, prompts = ask(config, "prose")
    opened = Corpus(config).held_out["prose"]
    bodies = [opened.token_ids(location) for location in opened.index.locate(np.arange(7))]
    again = [tokenizer.encode([tokenizer.decode(body)])[0] for body in bodies]
    assert any(
        len(a) != len(b) or (a != b).any() for a, b in zip(bodies, again, strict=True)
    )  # by text, others
    for sample, prompt, body in zip(samples, prompts, bodies, strict=True):
        asked = body[:TEXT_PROMPT_TOKENS]
        assert prompt.tokens.tolist() == [tokenizer.start_id, *asked.tolist()]
        assert not prompt.spans and prompt.document_ends == [len(asked) + 1]
        assert sample.media is None and sample.modality == "text"
        assert sample.reference == tokenizer.decode(body[: TEXT_PROMPT_TOKENS + NEW_TOKENS])
