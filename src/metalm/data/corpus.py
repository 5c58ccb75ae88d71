"""All that a process opens of a run's data, once: tokenizer, sources, and what encoders read files with.

Data workers and refused starts import this, so torch is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from metalm.config.model_schema import TEXT
from metalm.config.schema import Overflow, RunConfig
from metalm.data.documents.examples import ExampleMaker
from metalm.data.documents.maker import DocumentMaker
from metalm.data.documents.pairs import PairMaker
from metalm.data.documents.retokenize import SpanRetokenizer, load_retokenizer
from metalm.data.sources import Source, open_sources
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.errors import ConfigError
from metalm.modalities import Media, MediaReader, modality_of_encoder


class Corpus:
    """The data of a run, opened as it is asked for.

    Attributes:
        tokenizer: that decoder and shards share.
        packed: by held-out source, which samples make its rows, where that has been found out.
    """

    def __init__(
        self, config: RunConfig, *, check_sizes: bool = True, tokenizer_definition: bytes | None = None
    ) -> None:
        """
        Args:
            check_sizes: compare the size of every shard with its index.
            tokenizer_definition: the content of the tokenizer's file, where another process has read it.

        Raises:
            DataError: the tokenizer cannot be used.
        """
        self.config = config
        self.tokenizer = (
            load_tokenizer(config.data.tokenizer)
            if tokenizer_definition is None
            else Tokenizer(tokenizer_definition)
        )
        self.packed: dict[str, list[list[int]] | None] = {}
        self._check_sizes = check_sizes

    @functools.cached_property
    def sources(self) -> list[Source]:
        """The training sources, in the order of the config.

        Raises:
            ConfigError, DataError: as `open_sources`.
        """
        data, encoders = self.config.data, self.config.model.encoders
        return open_sources(data.sources, self.tokenizer, encoders, check_sizes=self._check_sizes)

    @functools.cached_property
    def held_out(self) -> dict[str, Source]:
        """The sources of data.evaluation, by name.

        Raises:
            ConfigError, DataError: as `open_sources`.
        """
        data, encoders = self.config.data, self.config.model.encoders
        opened = open_sources(data.evaluation, self.tokenizer, encoders, check_sizes=self._check_sizes)
        return {source.name: source for source in opened}

    def check(self) -> None:
        """Open all that training and evaluation will.

        Raises:
            ConfigError: sources, encoders or tokenizer do not fit each other.
            DataError: a source, or what reads it, cannot be used.
        """
        config, tokenizer = self.config, self.tokenizer
        if tokenizer.size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the tokenizer {config.data.tokenizer} "
                f"has {tokenizer.size} ids"
            )
        for source in (*self.sources, *self.held_out.values()):
            if self.document_maker(source) is None:
                self.retokenizer(source)

    def document_maker(self, source: Source) -> DocumentMaker | None:
        """What makes whole documents of a source; None: it is text, whose documents go on from row to row.

        Raises:
            ConfigError, DataError: as `pair_maker` and `example_maker`.
        """
        if source.holds_examples:
            assert source.overflow is not None
            return self.example_maker(source.readers, overflow=source.overflow)
        return None if source.media is None else self.pair_maker(source)

    def pair_maker(self, source: Source) -> PairMaker:
        """What makes documents of a source of pairs.

        Raises:
            ConfigError: as `PairMaker` and `Media.reader`.
        """
        config = self.config
        return PairMaker(source, self._media_readers, config.model.encoders, config.data.sequence_length)

    def example_maker(self, readers: Mapping[str, str], *, overflow: Overflow) -> ExampleMaker:
        """What makes documents of examples.

        Args:
            readers: the encoder of each modality, by name; text whose encoder the model lacks is read by the
                decoder.
            overflow: see `ExampleMaker`.

        Raises:
            ConfigError, DataError: as `ExampleMaker` and `Media.reader`.
        """
        return ExampleMaker(
            self.tokenizer,
            readers,
            media_readers=self._media_readers,
            encoders=self.config.model.encoders,
            retokenizer=self._retokenizer,
            sequence_length=self.config.data.sequence_length,
            overflow=overflow,
        )

    def retokenizer(self, source: Source) -> SpanRetokenizer | None:
        """For a source of text whose reader has a tokenizer of its own.

        Raises:
            DataError: as `load_retokenizer`.
        """
        return self._retokenizer(source.readers[TEXT]) if TEXT in source.readers else None

    @functools.cached_property
    def _media_readers(self) -> dict[str, MediaReader]:
        readers = {}
        for name, encoder in self.config.model.encoders.items():
            modality = modality_of_encoder(encoder)
            if isinstance(modality, Media):
                readers[name] = modality.reader(encoder)
        return readers

    @functools.cached_property
    def _retokenizer(self) -> Callable[[str], SpanRetokenizer | None]:
        encoders, shared = self.config.model.encoders, self.tokenizer
        return functools.cache(lambda name: load_retokenizer(encoders[name], shared))
