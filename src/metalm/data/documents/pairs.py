"""A pair of an image or a clip with a caption: `<s> [image or clip + prefix] rest </d>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metalm.config.model_schema import TEXT, EncoderConfig
from metalm.data.documents.maker import Made
from metalm.data.sources import Source
from metalm.data.storage.index import SampleLocation
from metalm.document import Document, Part
from metalm.errors import ConfigError
from metalm.modalities import MediaReader


class Seen(NamedTuple):
    """What is read of a pair before it waits for its row."""

    captions: list[str]
    media: Part


class PairMaker:
    """Makes documents of the pairs of one source."""

    def __init__(
        self,
        source: Source,
        media_readers: Mapping[str, MediaReader],
        encoders: Mapping[str, EncoderConfig],
        sequence_length: int,
    ) -> None:
        """
        Args:
            media_readers, encoders: of the model, by name.

        Raises:
            ConfigError: a row has no room for a caption beside the largest image or clip.
        """
        assert source.media is not None
        self._media, self._tokenizer = source.media, source.tokenizer
        self._reader = source.readers[source.media.name]
        self._text_reader = source.readers.get(TEXT)
        self._longest_prefix = encoders[self._text_reader].max_text_positions if self._text_reader else 0
        self._media_reader = media_readers[self._reader]
        self._sequence_length = sequence_length
        self.longest_caption(self.max_vectors)

    @property
    def max_vectors(self) -> int:
        """Positions of the largest image or clip."""
        return self._media_reader.max_vectors

    def longest_caption(self, num_vectors: int) -> int:
        """Caption tokens that fit in a row beside an image or clip, `<s>` and `</d>`.

        Raises:
            ConfigError: there is no room for a caption.
        """
        longest = self._sequence_length - num_vectors - 2
        if longest < 1:
            raise ConfigError(
                f"data.sequence_length is {self._sequence_length}: {num_vectors} patches, <s> and </d> leave "
                "no room for a caption"
            )
        return longest

    def media_part(self, data: bytes | memoryview) -> Part:
        """An image or clip, not decoded yet.

        Args:
            data: of its file.

        Raises:
            BadSample: its header shows that it cannot be used.
        """
        return self._media.part(data, self._media_reader, self._reader, self._tokenizer.paragraph_id)

    def document(self, media: Part, caption: np.ndarray, draw: float = 0.0) -> Document:
        """A pair, all of whose text is trained on.

        Args:
            media: from `media_part`.
            caption: [n] int, tokens.
            draw: in [0, 1); from 0 to n - 1 leading tokens of the caption are read by the source's reader of
                text, together with the image or clip where that is the same encoder.
        """
        prefix = int(draw * min(len(caption), self._longest_prefix + 1))
        return Document(
            (media, Part(TEXT, caption[:prefix], self._text_reader), Part(TEXT, caption[prefix:]))
        )

    def look(self, source: Source, location: SampleLocation) -> Seen:
        """The captions of a pair, and its image or clip, not decoded yet.

        Raises:
            BadSample: its captions are missing or damaged, or as `media_part`.
        """
        media = source.main_member(location)
        return Seen(source.captions(location), self.media_part(media))

    def finish(self, seen: Seen, draws: Sequence[float]) -> Made:
        """The document of a pair: the first draw chooses the caption, the second the length of the prefix."""
        which, prefix = draws
        caption = seen.captions[int(which * len(seen.captions))]
        ids = self._tokenizer.encode([caption])[0]
        kept = ids[: self.longest_caption(len(seen.media))]
        document = self.document(seen.media, kept, draw=prefix)
        return Made(document, truncated_captions=int(len(kept) < len(ids)))

    def read(self, part: Part) -> np.ndarray:
        """The image or clip of a part as its encoder is fed it: see `Document.decoded`.

        Raises:
            BadSample: it cannot be decoded.
        """
        assert isinstance(part.content, (bytes, memoryview))
        return self._media_reader.read(part.content)
