"""Images of training are augmented by draws of their own, and nothing else of the rows changes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.steps import global_rows, opened
from metalm.config import RunConfig
from metalm.data.corpus import Corpus
from metalm.data.held_out import evaluation_batches, pack_held_out
from metalm.data.storage.index import build_index
from metalm.objectives.semi_causal import SemiCausal

NUM_PAIRS = 12


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., None]) -> Path:
    """Images of noise, told apart by their captions."""
    folder, draw = tmp_path_factory.mktemp("noise"), np.random.default_rng(5)
    samples = []
    for number in range(NUM_PAIRS):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), np.uint8)).save(buffer, "PNG")
        captions = json.dumps({"captions": ["fox " * (1 + number)]}).encode()
        samples.append({"png": buffer.getvalue(), "json": captions})
    write_shard(folder / "pairs-00000.tar", samples)
    build_index(folder, kind="image_text")
    return folder


@pytest.fixture(scope="module")
def configs(pairs: Path, make_config: Callable[..., RunConfig]) -> dict[str, RunConfig]:
    """Without augmentation and with it."""
    readers = {"path": pairs, "readers": {"image": "vision"}}
    held_out = {"scenes": readers}
    augmented = {**readers, "augmentation": {"operations": 3}}
    return {
        "plain": make_config({"scenes": readers}, evaluation=held_out),
        "augmented": make_config({"scenes": augmented}, evaluation=held_out),
    }


def media_by_tokens(config: RunConfig, steps: int) -> list[tuple[bytes, bytes]]:
    """Tokens and images of each micro-batch."""
    found = []
    with opened(config) as data:
        for _ in range(steps):
            for batch in next(data):
                (share,) = batch.encoders["vision"].shares
                found.append((batch.tokens.numpy().tobytes(), share.media.numpy().tobytes()))
    return found


def test_only_the_pixels_change_and_each_epoch_others(configs: dict[str, RunConfig]) -> None:
    plain, augmented = (media_by_tokens(configs[name], 8) for name in ("plain", "augmented"))
    assert [tokens for tokens, _ in plain] == [tokens for tokens, _ in augmented]
    changed = sum(one != other for (_, one), (_, other) in zip(plain, augmented, strict=True))
    assert changed == len(plain)
    # Twelve images, each seen several times: never quite alike.
    size = 4 * 8 * 8 * 3
    images = [media[at : at + size] for _, media in augmented for at in range(0, len(media), size)]
    originals = {media[at : at + size] for _, media in plain for at in range(0, len(media), size)}
    assert len(originals) <= NUM_PAIRS + 1 < len(set(images)) / 3


def test_rows_are_the_same_on_other_ranks_and_workers_and_after_a_resume(
    configs: dict[str, RunConfig],
) -> None:
    config = configs["augmented"]
    expected, _ = global_rows(config, 6, dp_size=1)
    first, states = global_rows(config, 3, dp_size=2)
    second, _ = global_rows(config, 3, dp_size=4, states=states)
    assert first + second == expected


def test_evaluation_sees_the_images_as_they_are(configs: dict[str, RunConfig]) -> None:
    found = []
    for config in configs.values():
        corpus = Corpus(config)
        source = corpus.held_out["scenes"]
        batches = evaluation_batches(
            corpus,
            source,
            SemiCausal(),
            num_rows=4,
            packed=pack_held_out(corpus, source, 4),
            dp_rank=0,
            dp_size=1,
            tp_size=1,
        )
        found.append([batch.encoders["vision"].shares[0].media.numpy().tobytes() for batch in batches])
    assert found[0] == found[1]
