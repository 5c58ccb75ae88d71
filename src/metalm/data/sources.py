"""An opened source: its index, its shards, and how its samples become token ids and captions."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from metalm.config.model_schema import TEXT, EncoderConfig
from metalm.config.schema import Overflow, SourceConfig
from metalm.data.captions import decode_utf8, read_captions
from metalm.data.documents.example import Example
from metalm.data.documents.example_members import read_example
from metalm.data.storage.index import ShardIndex, open_index
from metalm.data.storage.locations import CAPTION_SUFFIXES, JSON_SUFFIXES, SUFFIXES, SampleLocation
from metalm.data.storage.member_readers import FileReader, RemoteReader
from metalm.data.storage.shard_scan import EXAMPLES, FORMATS, joined_checksum
from metalm.data.storage.tar import BytesStream, Member, scan_members
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BadSample, ConfigError, DataError
from metalm.modalities import MEDIA, Media
from metalm.modalities.text import TOKEN_DTYPES

_DTYPE_OF_FORMAT = {FORMATS.index(name): dtype for name, dtype in TOKEN_DTYPES.items()}


class Source:
    """A folder of shards, open for reading.

    Attributes:
        readers: the encoder that reads each modality of the samples; the decoder reads the others.
        media: what pairs hold beside their captions; None: the samples are text or examples.
        overflow: of examples, see `SourceConfig`.
    """

    def __init__(
        self,
        name: str,
        index: ShardIndex,
        tokenizer: Tokenizer | None,
        *,
        source_id: int = 0,
        url: str | None = None,
        weight: float = 1.0,
        readers: Mapping[str, str] | None = None,
        overflow: Overflow | None = None,
    ) -> None:
        self.name, self.source_id = name, source_id
        self.index, self._tokenizer = index, tokenizer
        self.url, self.weight = url, weight
        self.readers, self.overflow = dict(readers or {}), overflow
        self.media = index.modality if isinstance(index.modality, Media) else None
        self.reader = FileReader(index) if url is None else RemoteReader(index, url)

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a source that was opened with one."""
        assert self._tokenizer is not None
        return self._tokenizer

    def for_lane(self) -> Source:
        """This source for one lane: files are shared by all lanes, a stream stands at one place."""
        if self.url is None:
            return self
        return Source(
            self.name,
            self.index,
            self._tokenizer,
            source_id=self.source_id,
            url=self.url,
            weight=self.weight,
            readers=self.readers,
            overflow=self.overflow,
        )

    @property
    def holds_examples(self) -> bool:
        """Whether its samples are examples."""
        return self.index.kind == EXAMPLES

    def token_ids(self, location: SampleLocation) -> np.ndarray:
        """The token ids [n] of a text sample's body, without `<s>` and `</d>`.

        Raises:
            BadSample: `token_out_of_range`, `control_token`, `partial_token`, `not_utf8`, `untokenizable` or
                `empty_text`.
        """
        data = self.main_member(location)
        dtype = _DTYPE_OF_FORMAT.get(location.format)
        if dtype is None:
            ids = self.tokenizer.encode([decode_utf8(data)])[0]
            if not len(ids):
                raise BadSample("empty_text")
            return ids
        if not len(data) or len(data) % dtype.itemsize:
            raise BadSample("partial_token" if len(data) else "empty_text")
        ids = np.frombuffer(data, dtype)
        self.tokenizer.check_body(ids)
        return ids

    def captions(self, location: SampleLocation) -> list[str]:
        """The captions of a pair.

        Raises:
            BadSample: as `read_captions`.
            DataError: they are not those that were indexed.
        """
        text, description = (
            self.reader.read(location.shard, offset, size, suffixes) if size else b""
            for offset, size, suffixes in (
                (location.caption_offset, location.caption_size, CAPTION_SUFFIXES),
                (location.json_offset, location.json_size, JSON_SUFFIXES),
            )
        )
        self._compare(location, zlib.crc32(text) ^ zlib.crc32(description), location.text_checksum)
        return read_captions(text, description)

    def example(self, location: SampleLocation) -> Example:
        """An example; its images and clips are the bytes of their files.

        Raises:
            BadSample: as `read_example`.
            DataError: they are not those that were indexed.
        """
        sample = self.reader.read_sample(location)
        members = [one for one in scan_members(BytesStream(sample)) if isinstance(one, Member)]
        self._compare(location, joined_checksum(members), location.checksum)
        return read_example(sample)

    def try_out(self, location: SampleLocation) -> None:
        """Decode all that a sample holds.

        Raises:
            BadSample: something of it cannot be used.
        """
        if self.holds_examples:
            for part in self.example(location).parts:
                if not isinstance(part.content, str):
                    MEDIA[part.modality].decode(part.content)
        elif self.media is None:
            self.token_ids(location)
        else:
            self.captions(location)
            self.media.decode(self.main_member(location))

    def main_member(self, location: SampleLocation) -> memoryview:
        """The bytes of a sample's text, image or clip.

        Raises:
            DataError: they are not those that were indexed.
        """
        data = self.reader.read(location.shard, location.offset, location.size, SUFFIXES[location.format])
        self._compare(location, zlib.crc32(data), location.checksum)
        return data

    def _compare(self, location: SampleLocation, found: int, expected: int) -> None:
        if found != expected:
            raise DataError(
                f"shard {self.reader.path_of(location.shard)} is damaged, or its index is: sample "
                f"{location.sample}, near byte {location.offset}, is not what was indexed. Compare the shard "
                f"with its sha256 (tools/check_shards.py {self.index.folder}) and copy it anew; if it was "
                "changed on purpose, index the folder again"
            )


def open_source(name: str, folder: Path, tokenizer: Tokenizer | None, *, url: str | None = None) -> Source:
    """A folder of shards to look at, without readers; the shards may be other than the index states.

    Args:
        tokenizer: None will do for pairs.

    Raises:
        DataError: the index is missing, damaged or of another tokenizer; or it is of text, without one.
    """
    if tokenizer is None:
        index = open_index(folder, check_sizes=False)
        if not isinstance(index.modality, Media):
            raise DataError(
                f"{folder} holds {index.kind}: the tokenizer of these shards is needed (--tokenizer)"
            )
        return Source(name, index, None, url=url)
    return Source(name, _fitting_index(name, folder, tokenizer, check_sizes=False), tokenizer, url=url)


def open_sources(
    sources: Mapping[str, SourceConfig],
    tokenizer: Tokenizer,
    encoders: Mapping[str, EncoderConfig],
    *,
    check_sizes: bool = True,
) -> list[Source]:
    """Opens sources in the order of the config.

    Args:
        encoders: of the model.

    Raises:
        ConfigError: a source's readers do not fit what its shards hold.
        DataError: an index is missing, damaged or of another tokenizer.
    """
    opened = []
    for source_id, (name, config) in enumerate(sources.items()):
        index = _fitting_index(name, config.path, tokenizer, check_sizes=check_sizes and config.url is None)
        opened.append(
            Source(
                name,
                index,
                tokenizer,
                source_id=source_id,
                url=config.url,
                weight=config.weight,
                readers=_fitting_readers(name, config, index, encoders),
                overflow=config.overflow,
            )
        )
    return opened


def _fitting_readers(
    name: str, config: SourceConfig, index: ShardIndex, encoders: Mapping[str, EncoderConfig]
) -> dict[str, str]:
    """The source's readers that the model has: the decoder reads text whose encoder is not there."""
    if (index.kind == EXAMPLES) != (config.overflow is not None):
        raise ConfigError(
            f"source {name} ({config.path}) was indexed as {index.kind}: "
            + (
                "`overflow` is of examples"
                if config.overflow is not None
                else "say what becomes of texts longer than their encoder reads, by `overflow: split`, "
                "`cut_left` or `cut_right`"
            )
        )
    held = [*MEDIA] if index.modality is None else [index.modality.name]
    if unknown := [modality for modality in config.readers if modality not in (*held, TEXT)]:
        raise ConfigError(
            f"source {name} has a reader of {', '.join(unknown)}, but {config.path} was indexed as "
            f"{index.kind}"
        )
    if isinstance(index.modality, Media) and index.modality.name not in config.readers:
        modality = index.modality.name
        fitting = [encoder for encoder, one in encoders.items() if one.section(modality) is not None]
        raise ConfigError(
            f"source {name} ({config.path}) was indexed as {index.kind}: its readers must name an encoder of "
            f"{index.modality.unit}, such as {{{modality}: {next(iter(fitting), 'NAME')}}}"
        )
    # Those that the model lacks are told of at the start: what they would read, the decoder reads itself.
    return {modality: reader for modality, reader in config.readers.items() if reader in encoders}


def _fitting_index(name: str, folder: Path, tokenizer: Tokenizer, *, check_sizes: bool) -> ShardIndex:
    index = open_index(folder, check_sizes=check_sizes)
    written_by = index.tokenizer_fingerprint
    if written_by is not None and written_by != tokenizer.fingerprint:
        raise DataError(
            f"the shards of source {name} ({folder}) were written with the tokenizer {written_by[:16]}, "
            f"data.tokenizer is {tokenizer.fingerprint[:16]}: prepare the shards again or use their tokenizer"
        )
    return index
