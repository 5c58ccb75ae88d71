"""Examples to documents: who reads each part, what is trained on, and what becomes of texts too long.

Training rows, prompts, demonstrations and the options of a question all go through `ExampleMaker`, so their
tokens are laid out alike. A text that an encoder reads and the plain text behind it are told apart by the end
of the span; where the decoder reads both, `</s>` stands between them instead, unless a blank line does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from metalm.config.model_schema import TEXT, EncoderConfig
from metalm.config.schema import Overflow
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.documents.maker import Made
from metalm.data.documents.retokenize import SpanRetokenizer
from metalm.data.sources import Source
from metalm.data.storage.index import SampleLocation
from metalm.data.tokenizer import BLANK_LINE, Tokenizer
from metalm.document import Document, Part
from metalm.errors import BadSample, ConfigError
from metalm.modalities import MEDIA, MediaReader


class ExampleMaker:
    """Makes documents of examples, for one assignment of readers."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        readers: Mapping[str, str],
        *,
        media_readers: Mapping[str, MediaReader],
        encoders: Mapping[str, EncoderConfig],
        retokenizer: Callable[[str], SpanRetokenizer | None],
        sequence_length: int,
        overflow: Overflow,
    ) -> None:
        """
        Args:
            readers: the encoder of each modality, by name. Text without one is read by the decoder itself.
            media_readers, encoders: of the model, by name.
            retokenizer: what an encoder of text with a tokenizer of its own needs, by name.
            sequence_length: a document has at most so many positions.
            overflow: what becomes of a text that is longer than its encoder's `max_text_positions`. `split`:
                consecutive spans; `cut_left`, `cut_right`: it loses its beginning or its end, and more of it
                where the row is too short. A text that the decoder reads instead is cut to the row alone.

        Raises:
            ConfigError: the encoder of text reads none, or one of images or clips does not read those.
            DataError: as `load_retokenizer`.
        """
        self._tokenizer, self._sequence_length, self._overflow = tokenizer, sequence_length, overflow
        self._readers = {modality: name for modality, name in readers.items() if name in encoders}
        self._media_readers = media_readers
        for modality, name in self._readers.items():
            if modality != TEXT and encoders[name].section(modality) is None:
                raise ConfigError(f"encoder {name} does not read any {modality}: name another as its reader")
        self._text_reader = self._readers.get(TEXT)
        self._longest_text, self._own = sequence_length, None
        if self._text_reader is not None:
            self._longest_text = encoders[self._text_reader].max_text_positions
            if not self._longest_text:
                raise ConfigError(
                    f"encoder {self._text_reader} reads no text: name another as the reader of text, or none"
                )
            if encoders[self._text_reader].media is None:
                self._own = retokenizer(self._text_reader)

    def make(self, example: Example, *, is_open: bool = False, left_free: int = 0) -> Made:
        """The document of an example, not decoded yet: see `Document.decoded` and `read`.

        Args:
            is_open: without `</d>`, for the decoder to go on from: of prompts, and of options that more
                follows.
            left_free: positions of a row that are left to what is generated behind it.

        Raises:
            BadSample: `too_long` for a row, or the header of an image or a clip shows that it cannot be used.
            ConfigError: no reader of its images or clips.
        """
        pieces = self._pieces(example)
        texts = [piece for piece in pieces if isinstance(piece, _GivenText)]
        longest = self._sequence_length - left_free
        room = longest - 1 - (not is_open)
        room -= sum(len(piece) for piece in pieces if isinstance(piece, Part))
        limit = self._longest_text
        if self._overflow != "split" and _positions(texts, limit) > room:
            limit = _largest_fitting(texts, limit, room)
        parts: list[Part] = []
        num_cut = 0
        for piece in pieces:
            if isinstance(piece, Part):
                parts.append(piece)
            elif self._overflow == "split":
                parts += piece.split(limit)
            else:
                kept = piece.cut(limit)
                num_cut += len(piece) - len(kept)
                parts.append(kept)
        document = Document(tuple(parts), ends=not is_open)
        if len(document) > longest:
            raise BadSample("too_long")
        return Made(document, overflowed_tokens=num_cut)

    def look(self, source: Source, location: SampleLocation) -> Made:
        """The document of an example of a source, not decoded yet.

        Raises:
            BadSample: as `Source.example` and `make`.
            ConfigError: as `make`.
        """
        try:
            return self.make(source.example(location))
        except ConfigError as error:
            raise ConfigError(f"source {source.name}: {error}") from None

    def finish(self, seen: Made, draws: Sequence[float]) -> Made:
        """What was looked at: nothing of an example is drawn."""
        return seen

    def read(self, part: Part) -> np.ndarray:
        """An image or a clip as its encoder is fed it: see `Document.decoded`.

        Raises:
            BadSample: it cannot be decoded.
        """
        assert part.reader is not None and isinstance(part.content, (bytes, memoryview))
        return self._media_readers[part.reader].read(part.content)

    @property
    def max_vectors(self) -> int:
        """Positions of the largest image or clip that it has a reader of; 0: it has none."""
        readers = [name for modality, name in self._readers.items() if modality != TEXT]
        return max((self._media_readers[name].max_vectors for name in readers), default=0)

    def _pieces(self, example: Example) -> list[Part | _GivenText]:
        """Parts, and texts that can be cut; neighbouring ones of the example are one."""
        pieces: list[Part | _GivenText] = []
        waiting: list[str] = []  # encoded texts, for what follows them ends the run
        for part in (*example.parts, None):
            if part is not None and part.is_encoded and part.modality == TEXT:
                assert isinstance(part.content, str) and not part.is_trained
                waiting.append(part.content)
                continue
            if text := "".join(waiting):
                pieces += self._encoded(text, part)
            waiting = []
            if part is not None:
                pieces.append(self._plain(part) if part.modality == TEXT else self._media(part))
        return pieces

    def _encoded(self, text: str, following: ExamplePart | None) -> list[Part | _GivenText]:
        keeps_end = self._overflow == "cut_left"
        given = _GivenText(text, self._text_reader, self._tokenizer, self._own, keeps_end)
        if self._text_reader is not None:
            return [given]
        needs_end = not _begins_apart(following)
        if needs_end:
            given = replace(given, text=text.removesuffix(BLANK_LINE))
        if self._overflow == "split":
            return [self._tokens(given.text + BLANK_LINE * needs_end, 0.0)]
        return [given, *([self._tokens(BLANK_LINE, 0.0)] if needs_end else [])]

    def _plain(self, part: ExamplePart) -> Part:
        assert isinstance(part.content, str)
        plain = self._tokens(part.content, float(part.is_trained or part.is_end))
        if not part.is_end:
            return plain
        assert len(plain) == 1
        return replace(plain, targets=np.array([self._tokenizer.document_id], np.int32))

    def _tokens(self, text: str, weight: float) -> Part:
        return Part(TEXT, self._tokenizer.encode([text])[0], weight=weight)

    def _media(self, part: ExamplePart) -> Part:
        assert isinstance(part.content, (bytes, memoryview))
        media = MEDIA[part.modality]
        reader = self._readers.get(part.modality)
        if reader is None:
            raise ConfigError(
                f"an example holds one or more {media.unit}, which only an encoder reads: name an encoder of "
                f"the model in its readers, such as {{{part.modality}: NAME}}"
            )
        placeholder = self._tokenizer.paragraph_id
        return replace(media.part(part.content, self._media_readers[reader], reader, placeholder), weight=0.0)


@dataclass(frozen=True)
class _GivenText:
    """A text that an encoder reads, or the decoder in its place, however long it is."""

    text: str
    reader: str | None
    shared: Tokenizer
    own: SpanRetokenizer | None
    """Where the encoder has a tokenizer of its own."""
    keeps_end: bool

    def __len__(self) -> int:
        return len(self._whole)

    def split(self, longest: int) -> list[Part]:
        """Spans of at most so many positions, with parts of no tokens that keep them apart."""
        if self.own is not None:
            parts = [self._part(text) for text in self.own.split(self.text)]
        else:
            tokens = self._whole.tokens
            firsts = range(0, len(tokens), longest)
            parts = [replace(self._whole, tokens=tokens[first : first + longest]) for first in firsts]
        apart = Part(TEXT, np.empty(0, np.int32), weight=0.0)
        return [one for part in parts for one in (apart, part)][1:]

    def cut(self, longest: int) -> Part:
        """One span of at most so many positions."""
        if len(self) <= longest:
            return self._whole
        if self.own is not None:
            return self._part(self.own.cut(self.text, longest, keeps_end=self.keeps_end))
        tokens = self._whole.tokens
        kept = tokens[len(tokens) - longest :] if self.keeps_end else tokens[:longest]
        return replace(self._whole, tokens=kept)

    @functools.cached_property
    def _whole(self) -> Part:
        return self._part(self.text)

    def _part(self, text: str) -> Part:
        tokens = self.shared.encode([text])[0]
        if self.own is None:
            return Part(TEXT, tokens, self.reader, weight=0.0)
        ids = self.own.ids(text)
        # The position before the span predicts the text's own first token, as it does in rows of text.
        same = np.full(len(ids), tokens[0], np.int32)
        return Part(TEXT, same, self.reader, weight=0.0, content=ids)


def _begins_apart(following: ExamplePart | None) -> bool:
    """Whether what follows a text that was to be encoded is told apart from it."""
    if following is None:
        return False
    content = following.content
    return not isinstance(content, str) or content.startswith(BLANK_LINE)


def _positions(texts: list[_GivenText], limit: int) -> int:
    return sum(len(text.cut(limit)) for text in texts)


def _largest_fitting(texts: list[_GivenText], limit: int, room: int) -> int:
    """The largest length to which all texts are cut so that they have room together.

    Raises:
        BadSample: `too_long`, however much is cut.
    """
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        if _positions(texts, middle) <= room:
            low = middle
        else:
            high = middle
    if not low:
        raise BadSample("too_long")
    return low
