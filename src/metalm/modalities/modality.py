"""What a modality has to say for itself. A modality is one file with one class of this interface.

Modules here are imported by data workers, so torch and what else is slow to load come in where they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from metalm.config.model_schema import EncoderConfig
from metalm.document import Part

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from metalm.batch import EncoderShare

Convert = Callable[[bytes], tuple[str, bytes]]
"""The bytes of a file to the suffix and the content of its member, or BadSample; it travels to processes."""


class MediaReader(Protocol):
    """What an encoder is fed of the bytes of an image or a clip: the one way, wherever they come from."""

    max_vectors: int
    """Vectors of the largest one."""

    def count_vectors(self, data: bytes | memoryview) -> int:
        """How many vectors it has, from its header alone.

        Raises:
            BadSample: its header shows that it cannot be used.
        """
        ...

    def read(self, data: bytes | memoryview) -> np.ndarray:
        """What stands in `RowSpans.media`: the patches [n, ...] of an image, the features [1, ...] of a clip.

        Raises:
            BadSample: it cannot be decoded.
        """
        ...


class Board(Protocol):
    """Where images and clips are shown, such as TensorBoard."""

    def write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show pixels [height, width, 3] uint8."""
        ...

    def write_audio(self, step: int, name: str, samples: np.ndarray, sampling_rate: int) -> None:
        """Give samples [n] float32 in -1..1, one channel, to be heard."""
        ...


class Modality:
    """What documents can hold. Text is one as it stands here; images and clips are of `Media`."""

    name: ClassVar[str]
    """Key in `SourceConfig.readers`, section of `EncoderConfig`, and name of the main member in counts."""
    kind: ClassVar[str]
    """Of shards, as their index has it."""
    formats: ClassVar[Mapping[str, str]]
    """Suffixes of main members, lower case, and the formats that they stand for."""
    other_suffixes: ClassVar[frozenset[str]] = frozenset()
    """Suffixes of its files in formats that are not read: they are counted apart."""

    def no_media(self, encoder: EncoderConfig) -> np.ndarray:
        """What stands in a batch where an encoder has no image or clip: [0, ...]."""
        return np.empty((0, 0), np.uint8)

    def rows_of_media(self, num_vectors: np.ndarray) -> np.ndarray:
        """Rows [K] that images or clips of so many vectors [K] take in `RowSpans.media`."""
        return num_vectors

    def cost_lengths(self, lengths: np.ndarray, encoder: EncoderConfig) -> np.ndarray:
        """Elements [K] that spans of so many elements [K] cost an encoder."""
        return lengths

    def max_vectors(self, encoder: EncoderConfig) -> int:
        """Vectors of the largest image or clip."""
        return 0

    def weights_per_vector(self, encoder: EncoderConfig) -> int:
        """Multiplications that make one vector of an image or clip, before the layers."""
        return 0

    def embedding_modules(self, encoder: EncoderConfig) -> dict[str, Any]:
        """What embeds images or clips in an encoder of ours, as torch modules by name."""
        return {}

    def embed(self, modules: Any, share: EncoderShare, hidden: Tensor) -> Tensor:
        """Put the embedded patches of a share in the places of what stands there, [L, D].

        Args:
            modules: has those of `embedding_modules` as attributes.
        """
        return hidden

    def describe_input(self, encoder: EncoderConfig) -> str | None:
        """The images or clips that an encoder reads, for a model card."""
        return None

    def embedding_shapes(self, encoder: EncoderConfig) -> dict[str, tuple[int, ...]]:
        """Of the parameters of `embedding_modules`, by name, in their order."""
        return {}

    def exported_settings(self, encoder: EncoderConfig) -> dict[str, Any]:
        """What the shipped model and processor know of it, by the names of their configs."""
        return {}


class Media(Modality, ABC):
    """Images, clips and the like: files that stand in pairs with text, and lead a span of their encoder.

    All of them need what is abstract. `encode`, `try_out` and `vectors_of_zeros` are of those that encoders
    of transformers read, `exported_name`, `exported_media` and `proof_file` of those that exports know.
    """

    converted_suffixes: ClassVar[frozenset[str]] = frozenset()
    """Of `other_suffixes`, those of files that a preparation turns into one of `formats`."""
    noun: ClassVar[str]
    """What one is called to people."""
    exported_name: ClassVar[str]
    """Argument of the shipped model for what its encoders are fed."""

    def part(
        self, data: bytes | memoryview, reader: MediaReader, reader_name: str, placeholder_id: int
    ) -> Part:
        """A part of a document, not decoded yet.

        Args:
            data: of a file.
            reader: of the encoder `reader_name`.
            placeholder_id: of `</s>`, which the position before it predicts.

        Raises:
            BadSample: its header shows that it cannot be used.
        """
        tokens = np.full(reader.count_vectors(data), placeholder_id, np.int32)
        return Part(self.name, tokens, reader_name, content=data)

    @property
    def unit(self) -> str:
        """What several are called, in reports and options."""
        return f"{self.noun}s"

    @abstractmethod
    def reader(self, encoder: EncoderConfig) -> MediaReader:
        """How files become what an encoder is fed.

        Raises:
            ConfigError: something that it needs is not installed, or does not fit the encoder.
        """

    def encode(self, model: Any, share: EncoderShare, encoder: EncoderConfig, dtype: torch.dtype) -> Tensor:
        """Vectors of the patches of a share [P, D] by a model of transformers; where P is 0, of zeros."""
        raise NotImplementedError

    def try_out(self, model: Any, encoder: EncoderConfig, generator: torch.Generator) -> Tensor:
        """Vectors of something random, by which two ways of attention in a model are compared."""
        raise NotImplementedError

    def vectors_of_zeros(self, model: Any, encoder: EncoderConfig) -> Tensor:
        """Vectors of an image or a clip of zeros: which weights do they depend on?"""
        raise NotImplementedError

    def exported_media(self, media: np.ndarray, encoder: EncoderConfig) -> np.ndarray:
        """What stands in `RowSpans.media`, as the shipped model is fed it.

        Returns:
            One row for each image or clip, float32; rows of several encoders differ in their last dimension
            alone.
        """
        raise NotImplementedError

    def proof_file(self, encoder: EncoderConfig) -> bytes:
        """A file with detail in every vector, on which an exported model is proved."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, data: bytes | memoryview) -> Any:
        """An image or clip as people look at it, or listen to it.

        Raises:
            BadSample: it cannot be decoded.
        """

    @abstractmethod
    def show(
        self, board: Board, step: int, name: str, media: Any, lines: Sequence[str], *, first: bool
    ) -> None:
        """Show what `decode` gave, with what was said about it.

        Args:
            first: whether it is the first time in this process.
        """

    @abstractmethod
    def add_preparation_options(self, parser: ArgumentParser) -> None:
        """The options that the tool which prepares its files has of its own."""

    @abstractmethod
    def preparation_settings(self, options: Namespace) -> dict[str, int | float | None]:
        """Those options as the arguments of `convert`; positive where they are given.

        Raises:
            ValueError: an option is out of range.
        """

    @abstractmethod
    def convert(self, **settings: Any) -> Convert:
        """What checks a file and makes its member of a shard, as `preparation_settings` say."""
