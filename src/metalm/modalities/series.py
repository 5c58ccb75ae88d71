"""Series: measurements of fixed length, cut into stretches that are embedded linearly."""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from metalm.config.schema import EncoderConfig, SeriesConfig
from metalm.errors import BadSample, ConfigError
from metalm.modalities.modality import Board, Convert, Media

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from metalm.batch import EncoderShare


class Series(Media):
    """Little-endian float32 values in members `.f32`."""

    name = "series"
    kind = "series_text"
    noun = "measurement"
    is_exported = False
    formats: ClassVar = {"f32": "f32"}

    def settings(self, encoder: EncoderConfig) -> SeriesConfig | None:
        return encoder.series

    def reader(self, encoder: EncoderConfig) -> SeriesReader:
        return SeriesReader(_section(encoder))

    def no_media(self, encoder: EncoderConfig) -> np.ndarray:
        return np.empty((0, _section(encoder).stretch), np.float32)

    def max_vectors(self, encoder: EncoderConfig) -> int:
        return _section(encoder).num_patches

    def weights_per_vector(self, encoder: EncoderConfig) -> int:
        return _section(encoder).stretch * encoder.hidden_size

    def embedding_shapes(self, encoder: EncoderConfig) -> dict[str, tuple[int, ...]]:
        section, hidden = _section(encoder), encoder.hidden_size
        return {
            "stretch_embedding.weight": (hidden, section.stretch),
            "stretch_embedding.bias": (hidden,),
            "stretch_positions.weight": (section.num_patches, hidden),
        }

    def embedding_modules(self, encoder: EncoderConfig) -> dict[str, Any]:
        from torch import nn

        section, hidden = _section(encoder), encoder.hidden_size
        return {
            "stretch_embedding": nn.Linear(section.stretch, hidden),
            "stretch_positions": nn.Embedding(section.num_patches, hidden),
        }

    def embed(self, modules: Any, share: EncoderShare, hidden: Tensor) -> Tensor:
        places = share.positions.index_select(0, share.patch_slots)
        vectors = modules.stretch_embedding(share.media.to(hidden.dtype)) + modules.stretch_positions(places)
        return hidden.index_copy(0, share.patch_slots, vectors)

    def encode(self, model: Any, share: EncoderShare, encoder: EncoderConfig, dtype: torch.dtype) -> Tensor:
        raise ConfigError("no model of transformers reads series")

    def try_out(self, model: Any, encoder: EncoderConfig, generator: torch.Generator) -> Tensor:
        raise ConfigError("no model of transformers reads series")

    def vectors_of_zeros(self, model: Any, encoder: EncoderConfig) -> Tensor:
        raise ConfigError("no model of transformers reads series")

    def decode(self, data: bytes | memoryview) -> np.ndarray:
        return np.frombuffer(data, "<f4")

    def show(
        self, board: Board, step: int, name: str, media: Any, lines: Sequence[str], *, first: bool
    ) -> None:
        rows = np.clip(20 - np.asarray(media) * 10, 0, 39).astype(int)
        picture = np.full((40, len(rows), 3), 255, np.uint8)
        picture[rows, np.arange(len(rows))] = 0
        board.write_picture(step, name, picture)

    def add_preparation_options(self, parser: ArgumentParser) -> None:
        return None

    def preparation_settings(self, options: Namespace) -> dict[str, int | float | None]:
        return {}

    def convert(self, **settings: Any) -> Convert:
        return functools.partial(_keep)


class SeriesReader:
    def __init__(self, section: SeriesConfig) -> None:
        self._section = section
        self.max_vectors = section.num_patches

    def count_vectors(self, data: bytes | memoryview) -> int:
        if len(data) != 4 * self._section.length:
            raise BadSample("series_length")
        return self.max_vectors

    def read(self, data: bytes | memoryview) -> np.ndarray:
        return np.frombuffer(data, "<f4").reshape(self.max_vectors, self._section.stretch)


def _keep(data: bytes) -> tuple[str, bytes]:
    return "f32", data


def _section(encoder: EncoderConfig) -> SeriesConfig:
    assert encoder.series is not None
    return encoder.series
