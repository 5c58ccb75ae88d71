"""An opened source: its index, its shards, and how its samples become token ids, captions, pixels, clips."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from metalm.config.schema import SourceConfig
from metalm.data.audio import Clip, decode_clip
from metalm.data.failures import BadSample
from metalm.data.images import decode_image
from metalm.data.index import SampleLocation, ShardIndex, open_index
from metalm.data.reader import FileReader, RemoteReader
from metalm.data.shards import FORMATS, TOKEN_DTYPES
from metalm.data.tokenizer import Tokenizer
from metalm.errors import DataError

_DTYPE_OF_FORMAT = {FORMATS.index(name): dtype for name, dtype in TOKEN_DTYPES.items()}


class Source:
    """One source of the config, open for reading."""

    def __init__(
        self, name: str, source_id: int, config: SourceConfig, index: ShardIndex, tokenizer: Tokenizer
    ) -> None:
        self.name = name
        self.source_id = source_id
        self.config = config
        self.index = index
        self.reader = FileReader(index) if config.url is None else RemoteReader(index, config.url)
        self.tokenizer = tokenizer

    def for_lane(self) -> Source:
        """This source for one lane: files are shared by all lanes, a stream stands at one place."""
        if self.config.url is None:
            return self
        return Source(self.name, self.source_id, self.config, self.index, self.tokenizer)

    def document(self, location: SampleLocation) -> np.ndarray:
        """The token ids [n] of a text sample's body, without `<s>` and `</d>`.

        Raises:
            BadSample: `token_out_of_range`, `not_utf8` or `empty_text`.
        """
        data = self.reader.read(location.shard, location.offset, location.size)
        dtype = _DTYPE_OF_FORMAT.get(location.format)
        if dtype is None:
            ids = self.tokenizer.encode([_utf8(data)])[0]
            if not len(ids):
                raise BadSample("empty_text")
            return ids
        ids = np.frombuffer(data, dtype)
        if ids.max() >= self.tokenizer.size:
            raise BadSample("token_out_of_range")
        return ids

    def captions(self, location: SampleLocation) -> list[str]:
        """The captions of a pair: all of "captions" in the .json, else the .txt, else its "caption".

        Raises:
            BadSample: `not_utf8`, `bad_json` or `missing_caption`.
        """
        description: object = {}
        if location.json_size:
            data = self.reader.read(location.shard, location.json_offset, location.json_size)
            try:
                description = json.loads(_utf8(data))
            except (ValueError, RecursionError):
                raise BadSample("bad_json") from None
        if not isinstance(description, dict):
            raise BadSample("bad_json")
        captions = description.get("captions")
        if not captions and location.caption_size:
            captions = [
                _utf8(self.reader.read(location.shard, location.caption_offset, location.caption_size))
            ]
        if not captions:
            captions = [description.get("caption")]
        found = [text.strip() for text in captions if isinstance(text, str) and text.strip()]
        if not found:
            raise BadSample("missing_caption")
        return found

    def pixels(self, location: SampleLocation, *, image_size: int | None = None) -> np.ndarray:
        """The image [height, width, 3] uint8 of a pair, resized to a square if a size is given.

        Raises:
            BadSample: `image_bomb` or `undecodable_image`.
        """
        return decode_image(self.media(location), image_size=image_size)

    def clip(self, location: SampleLocation) -> Clip:
        """A pair's clip.

        Raises:
            BadSample: as `decode_clip`.
        """
        return decode_clip(self.media(location))

    def look(self, location: SampleLocation) -> np.ndarray | Clip:
        """A pair's image or clip, decoded.

        Raises:
            BadSample: as `pixels` and `clip`.
        """
        return self.pixels(location) if self.config.kind == "image_text" else self.clip(location)

    def media(self, location: SampleLocation) -> memoryview:
        """The bytes of a pair's image or clip."""
        return self.reader.read(location.shard, location.offset, location.size)


def open_sources(
    sources: Mapping[str, SourceConfig], tokenizer: Tokenizer, *, check_sizes: bool = True
) -> list[Source]:
    """Opens sources in the order of the config.

    Raises:
        DataError: an index is missing, damaged, of another kind or of another tokenizer.
    """
    return [
        Source(name, source_id, config, _fitting_index(name, config, tokenizer, check_sizes), tokenizer)
        for source_id, (name, config) in enumerate(sources.items())
    ]


def _fitting_index(name: str, config: SourceConfig, tokenizer: Tokenizer, check_sizes: bool) -> ShardIndex:
    index = open_index(config.path, check_sizes=check_sizes and config.url is None)
    if index.kind != config.kind:
        raise DataError(
            f"source {name} is of kind {config.kind}, but {config.path} was indexed as {index.kind}"
        )
    written_by = index.tokenizer_fingerprint
    if written_by is not None and written_by != tokenizer.fingerprint:
        raise DataError(
            f"the shards of source {name} ({config.path}) were written with the tokenizer {written_by[:16]}, "
            f"data.tokenizer is {tokenizer.fingerprint[:16]}: prepare the shards again or use their tokenizer"
        )
    return index


def _utf8(data: memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise BadSample("not_utf8") from None


@dataclass(frozen=True)
class Sample:
    """A sample as people look at it, or listen to it."""

    media: np.ndarray | Clip | None
    """Pixels [height, width, 3] uint8 of an image in its own size, or a clip; None: text."""
    captions: tuple[str, ...]
    text: str | None
    """The raw text of a text sample with a .txt member, or its decoded tokens."""


def read_samples(source: SourceConfig, count: int, tokenizer: Tokenizer) -> list[Sample]:
    """The first `count` usable samples of a source, in the order of its index.

    Raises:
        DataError: as `open_sources`.
    """
    (opened,) = open_sources({"samples": source}, tokenizer)
    samples: list[Sample] = []
    for sample in range(opened.index.num_samples):
        if len(samples) == count:
            break
        (location,) = opened.index.locate(np.array([sample]))
        try:
            if source.kind == "text":
                samples.append(Sample(None, (), tokenizer.decode(opened.document(location))))
            else:
                captions = tuple(opened.captions(location))
                samples.append(Sample(opened.look(location), captions, None))
        except BadSample:
            continue
    opened.reader.close()
    return samples
