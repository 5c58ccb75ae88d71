"""Contexts of lm-evaluation-harness to documents: which encoder reads what of them.

A context is what a user says in one turn, and laid out as the export's chat template does it: encoded as one
text, or an image and the text that belongs to it as one span; clips as images. A context that begins with
`<s>` is a prompt with the processor's markers already, as the template makes them of several turns.
What follows a context is plain, and one text with what of the context is plain at its end.
"""

from __future__ import annotations

import functools
import io
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from metalm.config.model_schema import TEXT
from metalm.conversion.export_answerer import ExportAnswerer
from metalm.conversion.shipped.audio_processing_metalm import open_clip
from metalm.conversion.shipped.processing_metalm import AUDIO_MARKER, IMAGE_MARKER, SPAN_END, SPAN_MARKER
from metalm.data.documents.chats import ANSWERING_ROLES, BLANKS
from metalm.data.documents.example import Example, ExamplePart
from metalm.data.documents.examples import ExampleMaker
from metalm.data.tokenizer import START
from metalm.document import Document, Part
from metalm.errors import BadSample, ConfigError, DataError
from metalm.modalities import MEDIA
from metalm.modalities.audio import Clip, encode_wav

MARKERS = {"image": IMAGE_MARKER, "audio": AUDIO_MARKER}
"""By modality."""
Files = Mapping[str, Sequence[bytes]]
"""Images and clips by modality, in the order of their markers."""
_ORIENTATION = 0x0112
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
"""Of Pillow, that PNG has, too."""


class _Span(NamedTuple):
    """What an encoder reads."""

    encoder: str | None
    """None: the one for images, for clips or for text."""
    modality: str | None
    """Of the image or clip that it begins with."""
    content: bytes
    """Of that."""
    text: str


class Fitted(NamedTuple):
    """A document that a row holds."""

    document: Document
    num_cut: int
    """Positions that it has lost."""


class HarnessPrompts:
    """Makes documents of contexts and what follows them."""

    def __init__(self, answerer: ExportAnswerer, *, encoded: bool) -> None:
        """
        Args:
            encoded: texts are read by encoders; else by the decoder itself. Images and clips always are.
        """
        self._answerer, self._processor = answerer, answerer.processor
        self._encoded = encoded

    @property
    def template(self) -> str | None:
        """The export's chat template; None: it has none."""
        return self._processor.chat_template

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The marked context of a chat.

        Args:
            messages: with `role`, and `content` in which `<image>` stands for an image and `<audio>` for a
                clip. Where the last is an answer, the model goes on from it.

        Raises:
            ConfigError: the export has no chat template.
        """
        if self.template is None:
            raise ConfigError(
                "the exported model has no chat template, since it has no encoders and was not trained on "
                "chats: leave out --apply_chat_template"
            )
        typed = [{**one, "content": self._typed(_split(one["content"], MARKERS))} for one in messages]
        prompt = self._processor.apply_chat_template(typed, add_generation_prompt=True)
        last = messages[-1]
        begun = last["content"] if last["role"] in ANSWERING_ROLES else ""
        return START + prompt + begun[len(begun.rstrip(BLANKS)) :]

    def prompt(self, context: str, files: Files) -> Document:
        """A context for the model to go on from.

        Args:
            files: in the order of their markers `<image>` and `<audio>`; where there is no marker, before the
                text.

        Raises:
            ConfigError: markers and files do not fit each other or the model.
            DataError: an image or a clip cannot be read.
        """
        return self._document(self._marked(context, files), "", files)

    def pair(self, context: str, continuation: str, files: Files) -> Document:
        """A context, and what follows it, which is weighted. Blanks between them are the continuation's.

        Raises:
            ConfigError, DataError: as `prompt`.
        """
        kept = context.rstrip()
        return self._document(self._marked(kept, files), context[len(kept) :] + continuation, files)

    def text(self, text: str) -> np.ndarray:
        """Tokens [n] int32 of a plain text.

        Raises:
            DataError: the tokenizer gives up on it.
        """
        try:
            return self._answerer.tokenizer.encode([text])[0]
        except BadSample as bad:
            raise DataError(f"a text cannot be evaluated ({bad.cause}): {text[:80]!r}") from None

    def read(self, part: Part) -> np.ndarray:
        """See `Document.decoded`."""
        return self._maker(None, None, None).read(part)

    def _marked(self, context: str, files: Files) -> str:
        if context.startswith(START):
            return context.removeprefix(START)
        given = {modality: of_it for modality, of_it in files.items() if of_it}
        pieces = _split(context, given)
        for modality, of_it in given.items():
            if (modality, "") not in pieces:
                pieces = [(modality, "")] * len(of_it) + pieces
        if self._encoded and self.template is not None:
            turn = {"role": "user", "content": self._typed(pieces)}
            return self._processor.apply_chat_template([turn], add_generation_prompt=True)
        return "".join(MARKERS.get(kind) or self._processor.escape(text) for kind, text in pieces)

    def _typed(self, pieces: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        """The content of a message of texts, images and clips."""
        return [
            {"type": TEXT, "text": self._processor.escape(text)} if kind == TEXT else {"type": kind}
            for kind, text in pieces
        ]

    def _document(self, marked: str, continuation: str, files: Files) -> Document:
        pieces = self._pieces(marked, files)
        tail = pieces.pop() if pieces and isinstance(pieces[-1], str) else ""
        assert isinstance(tail, str)
        parts: list[Part] = []
        for piece in pieces:
            parts += (
                [Part(TEXT, self.text(piece), weight=0.0)] if isinstance(piece, str) else self._span(piece)
            )
        tokens, num_given = self.text(tail + continuation), len(self.text(tail))
        parts += [Part(TEXT, tokens[:num_given], weight=0.0), Part(TEXT, tokens[num_given:])]
        return Document(tuple(parts), ends=False)

    def _pieces(self, marked: str, files: Files) -> list[_Span | str]:
        """What encoders read, and plain texts."""
        counts = {"image": self._processor.num_images(marked), "audio": self._processor.num_clips(marked)}
        for modality, count in counts.items():
            if count != (given := len(files.get(modality, ()))):
                raise ConfigError(
                    f"a context marks {count} {MEDIA[modality].noun}(s) by {MARKERS[modality]}, the task "
                    f"gives {given}: {marked[:200]!r}"
                )
        waiting = {MARKERS[modality]: (modality, iter(of_it)) for modality, of_it in files.items()}
        pieces: list[_Span | str] = []
        span: _Span | None = None
        for piece, is_mark in self._processor.pieces(marked):
            opening = SPAN_MARKER.fullmatch(piece) if is_mark else None
            if not is_mark and span is None:
                pieces.append(piece)
            elif not is_mark and span is not None:
                span = span._replace(text=span.text + piece)
            elif opening is not None and span is None:
                span = _Span(opening[1], None, b"", "")
            elif piece == SPAN_END and span is not None:
                pieces.append(span)
                span = None
            elif piece in waiting and (span is None or (span.modality is None and not span.text)):
                modality, contents = waiting[piece]
                if span is None:
                    pieces.append(_Span(None, modality, next(contents), ""))
                else:
                    span = span._replace(modality=modality, content=next(contents))
            else:
                raise ConfigError(f"{piece} is out of place in the context {marked[:200]!r}")
        if span is not None:
            raise ConfigError(f"<span> has no counterpart in the context {marked[:200]!r}")
        return pieces

    def _span(self, span: _Span) -> list[Part]:
        """The parts of a span: behind one of no tokens, which keeps it apart from the span before it."""
        usual = {
            None: self._processor.text_encoder,
            "image": self._processor.image_encoder,
            "audio": self._processor.audio_encoder,
        }
        named = span.encoder or usual[span.modality]
        if named not in self._processor.encoders:
            known = ", ".join(self._processor.encoders) or "none"
            raise ConfigError(f"no encoder {repr(named) if named else 'is there'}; the model has: {known}")
        parts = []
        if span.modality is not None:
            parts.append(ExamplePart(span.content, span.modality, is_encoded=True))
        if span.text:
            parts.append(ExamplePart(span.text, is_encoded=True))
        maker = self._maker(span.modality, named, named if span.text and self._encoded else None)
        try:
            made = maker.make(Example((ExamplePart(""), *parts)), is_open=True)
        except BadSample as bad:
            what = f"the text {span.text[:80]!r}" if span.modality is None else f"an {span.modality}"
            raise DataError(f"{what} of a context cannot be evaluated: {bad.cause}") from None
        return list(made.document.parts)

    @functools.cache  # noqa: B019 - as long-lived as the model
    def _maker(self, modality: str | None, media_reader: str | None, text_reader: str | None) -> ExampleMaker:
        """Of documents of any length."""
        readers = {modality: media_reader, TEXT: text_reader}
        return self._answerer.maker(
            {kind: name for kind, name in readers.items() if kind is not None and name is not None},
            self._processor.overflow or "split",
            sequence_length=sys.maxsize,
        )


def fit(document: Document, longest: int) -> Fitted:
    """Cut a document on the left, behind `<s>`, to so many positions; images are lost as a whole.

    Raises:
        ConfigError: what is weighted is too long by itself.
    """
    parts = list(document.parts)
    excess = too_long = max(len(document) - longest, 0)
    while excess > 0:
        first = parts.pop(0)
        if first.weight:
            raise ConfigError(
                f"a continuation has {len(first)} tokens, which do not fit the {longest} positions of the "
                "model behind <s>"
            )
        if first.content is None and len(first) > excess:
            parts.insert(0, replace(first, tokens=first.tokens[excess:]))
            excess = 0
        else:
            excess -= len(first)
    return Fitted(replace(document, parts=tuple(parts)), too_long - excess)


def _split(context: str, modalities: Iterable[str]) -> list[tuple[str, str]]:
    """The texts of a context, and the modalities of the images and clips between them."""
    kinds = {MARKERS[modality]: modality for modality in modalities}
    if not kinds:
        return [(TEXT, context)]
    pieces = re.split(f"({'|'.join(kinds)})", context)
    return [(kinds[piece], "") if piece in kinds else (TEXT, piece) for piece in pieces]


def clip_files(given: Any) -> list[bytes]:
    """What a task gives as clips, as files.

    Args:
        given: dictionaries of `array` and `sampling_rate`, or paths or contents of files as in training;
            one or several.

    Raises:
        DataError: it is something else, or a file cannot be read.
    """
    return [_clip_file(one) for one in (given if isinstance(given, list | tuple) else [given])]


def _clip_file(clip: Any) -> bytes:
    if isinstance(clip, bytes):
        return clip
    try:
        if isinstance(clip, str | Path):
            return Path(clip).read_bytes()
        opened = open_clip(clip, longest_s=math.inf)
    except (OSError, ValueError) as error:
        raise DataError(f"a clip of the task cannot be read: {error}") from None
    return encode_wav(Clip(np.asarray(opened), opened.sampling_rate))


def image_files(given: Any) -> list[bytes]:
    """What a task gives as images, as files.

    Args:
        given: PIL images, or paths or contents of JPEG, PNG or WebP files; one or several.

    Raises:
        DataError: it is something else, or a file cannot be read.
    """
    return [_file(one) for one in (given if isinstance(given, list | tuple) else [given])]


def _file(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"image {image} cannot be read: {error}") from None
    if not isinstance(image, Image.Image):
        raise DataError(f"an image is a {type(image).__name__}: PIL images, paths and bytes are read")
    buffer, upright = io.BytesIO(), Image.Exif()
    try:
        upright[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
        (image if image.mode in _MODES else image.convert("RGB")).save(buffer, "PNG", exif=upright)
    except Exception as error:  # of a file that is opened late, whatever its parser raises
        raise DataError(f"an image of the task cannot be read: {type(error).__name__}: {error}") from None
    return buffer.getvalue()
