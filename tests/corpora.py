"""Small corpora and configurations, and a way to start the tools as a user does: fixtures of all tests."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from metalm.config.model_schema import EncoderConfig
from metalm.config.schema import RunConfig
from metalm.data.storage.index import build_index
from metalm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TOOLS = Path(__file__).parents[1] / "tools"
ShardWriter = Callable[..., None]
RunTool = Callable[..., tuple[int, str, str]]

IMAGE_SIZE, PATCH_SIZE = 16, 8
VOCABULARY = 300


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 20], VOCABULARY, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """Makes a JPEG of one colour."""

    def make(color: tuple[int, int, int], size: tuple[int, int] = (24, 20)) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", size, color).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def write_shard() -> ShardWriter:
    """Writes samples {suffix: bytes} with plain webdataset, under keys 00000000, 00000001, ..."""

    def write(path: Path, samples: Sequence[dict[str, bytes]], first_key: int = 0) -> None:
        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for number, sample in enumerate(samples, start=first_key):
                writer.write({"__key__": f"{number:08d}", **sample})

    return write


@pytest.fixture(scope="session")
def text_source(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, write_shard: ShardWriter
) -> Callable[..., Path]:
    """Makes a folder of token shards: `text_source([5, 3])` has 5 documents in one shard, 3 in another."""

    def make(documents_per_shard: Sequence[int], lengths: tuple[int, int] = (2, 120)) -> Path:
        folder = tmp_path_factory.mktemp("text")
        draw, number = np.random.default_rng(7), 0
        for shard, count in enumerate(documents_per_shard):
            samples = []
            for _ in range(count):
                body = draw.integers(5, 260, draw.integers(lengths[0], lengths[1] + 1)).astype("<u2")
                samples.append({"u16": body.tobytes()})
                number += 1
            write_shard(folder / f"text-{shard:05d}.tar", samples, number - count)
        build_index(folder, kind="text", tokenizer_fingerprint=tokenizer.fingerprint)
        return folder

    return make


@pytest.fixture(scope="session")
def pair_source(
    tmp_path_factory: pytest.TempPathFactory, write_shard: ShardWriter, jpeg: Callable[..., bytes]
) -> Callable[..., Path]:
    """Makes a folder of pairs; image i is of one colour (i, 2i, 3i) and is captioned "fox i ...."."""

    def make(pairs_per_shard: Sequence[int]) -> Path:
        folder = tmp_path_factory.mktemp("pairs")
        number = 0
        for shard, count in enumerate(pairs_per_shard):
            samples = []
            for _ in range(count):
                samples.append(
                    {
                        "jpg": jpeg((number % 256, 2 * number % 256, 3 * number % 256)),
                        "json": json.dumps({"captions": [f"fox {number}" + " dog" * (number % 5)]}).encode(),
                    }
                )
                number += 1
            write_shard(folder / f"pairs-{shard:05d}.tar", samples, number - count)
        build_index(folder, kind="image_text")
        return folder

    return make


_SHAPE = {"num_layers": 1, "hidden_size": 16, "num_heads": 2}


@pytest.fixture(scope="session")
def encoders() -> dict[str, EncoderConfig]:
    """Of text and of images, those of the runs of `make_config`."""
    image = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    sections = {
        "text": {**_SHAPE, "max_text_positions": 16},
        "vision": {**_SHAPE, "max_text_positions": 6, "image": image},
    }
    return {name: EncoderConfig.model_validate(section) for name, section in sections.items()}


@pytest.fixture(scope="session")
def make_config(tokenizer_folder: Path, encoders: dict[str, EncoderConfig]) -> Callable[..., RunConfig]:
    """A run on given sources, with keys of `data` and `training` to change."""

    def make(
        sources: dict[str, dict[str, Any]],
        *,
        data: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        evaluation: dict[str, dict[str, Any]] | None = None,
        seed: int = 3,
    ) -> RunConfig:
        return RunConfig.model_validate(
            {
                "run": {"name": "test", "seed": seed},
                "model": {
                    "vocab_size": VOCABULARY,
                    "decoder": _SHAPE,
                    "encoders": encoders,
                },
                "data": {
                    "tokenizer": tokenizer_folder,
                    "sequence_length": 64,
                    "lanes": 4,
                    "workers": 0,
                    "shuffle_window": 8,
                    "chunk_samples": 4,
                    "spans": {"fraction": 0.25, "min_length": 4, "max_length": 8},
                    "sources": sources,
                    "evaluation": evaluation or {},
                    **(data or {}),
                },
                "training": {
                    "steps": 10,
                    "global_batch_size": 8,
                    "micro_batch_size": 2,
                    **(training or {}),
                },
            }
        )

    return make


@pytest.fixture(scope="session")
def run_tool() -> RunTool:
    """Runs a tool as a user does, to its end: exit code, standard output, standard error."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        return done.returncode, done.stdout, done.stderr

    return run
