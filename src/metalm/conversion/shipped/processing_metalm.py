"""Prompts, images and clips to the model's inputs: what the encoders read is marked in the prompt.

    <span>some text</span>            the text encoder reads it, the decoder sees its vectors
    <image>                           the image encoder reads the next image
    <span><image>some text</span>     the image encoder reads the next image and the text together
    <audio>                           the audio encoder reads the next clip
    <span:NAME>...</span>             the encoder NAME reads it

Everything else is text that the decoder reads itself. A prompt starts with `<s>`, as documents did in
training. Markers are looked for in the string, before tokens are made; they are no tokens themselves. A
special token that is spelt out (`</d>`) is that token. A backslash before a marker or a special token makes
it text, and is itself written as two there; elsewhere a backslash is a backslash. `<|>` is nothing: it parts
what stands before it from what follows. `escape` writes a text so that it may be joined to any prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file

from .audio_processing_metalm import ClipFeatures, MetaLMAudioProcessor, open_clip
from .boxes_metalm import PixelBox, boxes_in
from .image_processing_metalm import MetaLMImageProcessor

IMAGE_MARKER, AUDIO_MARKER = "<image>", "<audio>"
NOUNS = {IMAGE_MARKER: "image", AUDIO_MARKER: "clip"}
OWN_TOKENIZER_NAME = "tokenizer_of_{}.json"
"""File of the tokenizer of an encoder."""
SPAN_MARKER = re.compile(r"<span(?::([a-z0-9_]+))?>")
SPAN_END = "</span>"
_NOTHING = "<|>"
_ENCODER_NAME = re.compile("[a-z][a-z0-9_]*")


class Prompt(NamedTuple):
    """One prompt; the first four are of its length. See `Spans` in encoder_metalm.py."""

    input_ids: list[int]
    span_input_ids: list[int]
    span_encoders: list[int]
    span_numbers: list[int]
    num_images: int
    clips: list[ClipFeatures]


class Span(NamedTuple):
    """What one encoder reads."""

    encoder: str | None
    """None: the one for images, for clips or for text."""
    marker: str | None
    """Of the image or clip that it begins with."""
    ids: list[int]
    """Of the text behind that."""
    words: list[str]
    """That text without special tokens, in pieces."""


class MetaLMProcessor(ProcessorMixin):
    """Tokenizer and preparation of images and clips in one."""

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        encoders: dict[str, dict[str, Any]] | None = None,
        image_encoder: str | None = None,
        text_encoder: str | None = None,
        image_size: int | None = None,
        overflow: str | None = None,
        audio_encoder: str | None = None,
        readers: dict[str, str] | None = None,
    ) -> None:
        """Made by `AutoProcessor.from_pretrained`.

        Args:
            encoders: by name, `max_text_positions`, `num_patches` (0: text only); for an encoder with a
                tokenizer of its own also `vocab_size` of the model and `own_vocab_size` of the encoder, the
                tokenizer being in a file beside; for one of clips `audio`, how they are prepared.
            image_encoder: reads images whose span names none.
            text_encoder: reads texts whose span names none.
            image_size: pixels per side.
            overflow: what becomes of a text that is longer than its encoder reads, as in training: `split`
                (spans one after another), `cut_left` or `cut_right`; None: it is refused.
            audio_encoder: reads clips whose span names none.
            readers: the encoder of each modality of a task's questions, by name, as the run itself is asked;
                what none reads is the decoder's.
        """
        super().__init__(tokenizer, chat_template=chat_template)
        self.encoders = dict(sorted((encoders or {}).items()))
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.audio_encoder = audio_encoder
        self.readers = readers
        self.image_size = image_size
        self.overflow = overflow
        self.image_token = IMAGE_MARKER
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
        self._image_processor = None if image_size is None else MetaLMImageProcessor(image_size)
        self._audio_processors = {
            name: MetaLMAudioProcessor(sizes["audio"])
            for name, sizes in self.encoders.items()
            if sizes.get("audio") is not None
        }
        self._own_tokenizers: dict[str, Tokenizer] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> MetaLMProcessor:
        """As any processor's, with the tokenizers of encoders that have their own."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        where = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        processor.load_own_tokenizers(lambda file: cached_file(pretrained_model_name_or_path, file, **where))
        return processor

    def load_own_tokenizers(self, path_of: Callable[[str], Any]) -> None:
        """Read the tokenizers of encoders that have their own.

        Args:
            path_of: a file of the processor's folder to its path.

        Raises:
            ValueError: one is missing, damaged or of another vocabulary, or its name is no plain word.
        """
        for name, sizes in self.encoders.items():
            if "vocab_size" in sizes:
                if not _ENCODER_NAME.fullmatch(name):
                    raise ValueError(f"{name!r} is no name of an encoder")
                path = path_of(OWN_TOKENIZER_NAME.format(name))
                try:
                    own = Tokenizer.from_file(str(path))
                except Exception as error:  # tokenizers raises plain Exception
                    raise ValueError(f"{path} is no tokenizer: {error}") from None
                if own.get_vocab_size() > sizes["own_vocab_size"]:
                    raise ValueError(f"{path} has {own.get_vocab_size()} ids, more than its encoder")
                own.no_padding()
                own.no_truncation()
                self._own_tokenizers[name] = own

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """As any processor's, with the image processor and the tokenizers of encoders that have their own."""
        is_pushed, place = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None)
        saved = super().save_pretrained(save_directory, **kwargs)
        if self._image_processor is not None:
            if self._auto_class is not None:  # from a folder, whose code is saved with it
                self._image_processor.register_for_auto_class()
            self._image_processor.save_pretrained(save_directory)
        for name, own in self._own_tokenizers.items():
            own.save(str(Path(save_directory) / OWN_TOKENIZER_NAME.format(name)))
        if is_pushed:  # all files, those of the tokenizers, too
            self.push_to_hub(place or Path(save_directory).name, **kwargs)
        return saved

    @property
    def model_input_names(self) -> list[str]:
        """What a call may answer with."""
        spans = ["span_input_ids", "span_encoders", "span_numbers"] if self.encoders else []
        media = {"pixel_values": self.image_encoder, "audio_values": self._audio_processors}
        return ["input_ids", "attention_mask", *spans, *(name for name, read in media.items() if read)]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: Any = None,
        *,
        sampling_rate: int | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = True,
        padding_side: str = "left",
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prepare prompts for the model.

        Args:
            images: one, a list in the order of the prompts' image markers, or a list per prompt. Each is a
                PIL image, [height, width, 3] uint8, the bytes or the path of an image file, or a URL.
            text: one prompt or several.
            videos: None; transformers hands them over.
            audio: one, a list in the order of the prompts' audio markers, or a list per prompt. Each is the
                path or the bytes of a WAV, FLAC, Ogg or MP3 file, a URL, samples [n] of one channel, or these
                in a dictionary of `array` and `sampling_rate`.
            sampling_rate: of samples that do not tell their own, in hertz.
            add_special_tokens: put `<s>` before prompts that do not start with it.
            padding: False, True (to the longest prompt) or "max_length".
            padding_side: "left" for generation.
            max_length: length with padding "max_length", else the longest prompt allowed.
            truncation: cutting would tear spans, so True is refused.
            return_tensors: "pt", "np" or None for lists.

        Returns:
            `input_ids` and `attention_mask`; span tensors if there is a span; `pixel_values` [images, 3,
            height, width] float32 if there is an image; `audio_values` [clips, values] float32 if there is a
            clip.

        Raises:
            ValueError: a prompt's markers, length, images or clips do not fit the model.
        """
        if text is None:
            raise ValueError("text is missing; the prompt of an image by itself is '<image>'")
        if videos is not None:
            raise ValueError("this model reads no videos")
        if truncation:
            raise ValueError("truncation is not supported, because it would cut spans: shorten the prompt")
        texts = [text] if isinstance(text, str) else list(text)
        clips = iter(_flat_media(AUDIO_MARKER, audio, [self._count(one, AUDIO_MARKER) for one in texts]))
        prompts = [self._prompt(one, add_special_tokens, clips, sampling_rate) for one in texts]
        given = _flat_media(IMAGE_MARKER, images, [prompt.num_images for prompt in prompts])
        pixels = [self._prepare_image(image) for image in given]
        lengths = [len(prompt.input_ids) for prompt in prompts]
        if max_length is not None and max(lengths) > max_length:
            raise ValueError(f"the longest prompt has {max(lengths)} tokens, max_length is {max_length}")
        if not padding:
            width = None
        else:
            width = max_length if padding == "max_length" and max_length is not None else max(lengths)

        def column(values: Sequence[Sequence[int]], filler: int) -> list[list[int]]:
            return [_padded(row, width, filler, padding_side) for row in values]

        data: dict[str, Any] = {
            "input_ids": column([p.input_ids for p in prompts], self.tokenizer.pad_token_id),
            "attention_mask": column([[1] * length for length in lengths], 0),
        }
        if any(any(p.span_numbers) for p in prompts):
            data["span_input_ids"] = column([p.span_input_ids for p in prompts], self.tokenizer.pad_token_id)
            data["span_encoders"] = column([p.span_encoders for p in prompts], 0)
            data["span_numbers"] = column([p.span_numbers for p in prompts], 0)
        if pixels:
            data["pixel_values"] = torch.stack(pixels) if return_tensors == "pt" else np.stack(pixels)
        if features := [clip.values for prompt in prompts for clip in prompt.clips]:
            widest = max(map(len, features))
            data["audio_values"] = np.stack([np.pad(one, (0, widest - len(one))) for one in features])
        return BatchFeature(data, tensor_type=return_tensors)

    def _prepare_image(self, image: Any) -> torch.Tensor:
        if self._image_processor is None:
            raise ValueError("an image was given, but this model reads none")
        return self._image_processor.prepare_image(image)

    def prepare_clip(
        self, clip: Any, encoder: str | None = None, *, sampling_rate: int | None = None
    ) -> ClipFeatures:
        """What an encoder reads of a clip.

        Args:
            clip, sampling_rate: as of a call.
            encoder: None: the one for clips.

        Raises:
            ValueError: the encoder reads none, or the clip cannot be used.
        """
        name = encoder or self.audio_encoder
        if name not in self._audio_processors:
            raise ValueError(f"encoder {name!r} reads no clips" if name else "this model reads no clips")
        return self._audio_processors[name].prepare(clip, sampling_rate)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As any processor's; clips are decoded as in training."""
        return super().apply_chat_template(self._with_open_clips(conversation), chat_template, **kwargs)

    def _with_open_clips(self, conversation: Any) -> Any:
        """Messages whose clips are samples that know their rate: transformers hands them over as they are."""
        if isinstance(conversation, list | tuple):
            return [self._with_open_clips(one) for one in conversation]
        content = conversation.get("content") if isinstance(conversation, dict) else None
        if not isinstance(content, list | tuple) or not self._audio_processors:
            return conversation
        longest_s = max(one.longest_s for one in self._audio_processors.values())
        parts = []
        for part in content:
            given = [part[name] for name in ("audio", "url", "path") if part.get(name) is not None]
            if part.get("type") == "audio" and given and not isinstance(given[0], np.ndarray):
                part = {"type": "audio", "audio": open_clip(given[0], longest_s=longest_s)}
            parts.append(part)
        return {**conversation, "content": parts}

    def post_process_boxes(
        self, texts: str | Sequence[str], target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[list[PixelBox] | None]:
        """The boxes (left, top, right, bottom) that each answer tells; None where one is malformed.

        Args:
            texts: decoded answers.
            target_sizes: height and width of the image of each, in pixels; None: boxes are shares of them.
        """
        answers = [texts] if isinstance(texts, str) else list(texts)
        sizes = [(1, 1)] * len(answers) if target_sizes is None else target_sizes
        return [boxes_in(text, *size) for text, size in zip(answers, sizes, strict=True)]

    def escape(self, text: str) -> str:
        """A text as a prompt in which nothing of it is a marker or a special token, whatever follows it."""
        escaped = self._marks.sub(lambda found: 2 * found[1] + "\\" + found[2], text)
        backslashes = len(escaped) - len(escaped.rstrip("\\"))
        return escaped + backslashes * "\\" + _NOTHING if backslashes else escaped

    def num_images(self, text: str) -> int:
        """How many images a prompt marks."""
        return self._count(text, IMAGE_MARKER)

    def num_clips(self, text: str) -> int:
        """How many clips a prompt marks."""
        return self._count(text, AUDIO_MARKER)

    def _count(self, text: str, marker: str) -> int:
        return sum(piece == marker for piece, is_mark in self.pieces(text) if is_mark)

    @property
    def _marks(self) -> re.Pattern[str]:
        """A marker or special token, with the backslashes before it."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted({*self.tokenizer.all_special_tokens, *added}, key=lambda one: (-len(one), one))
        special = [re.escape(token) for token in longest_first]
        return re.compile(
            r"(\\*)("
            + "|".join(
                [SPAN_MARKER.pattern, SPAN_END, re.escape(_NOTHING), IMAGE_MARKER, AUDIO_MARKER, *special]
            )
            + ")"
        )

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Text, and whether it is a marker or special token; backslashes have done their work."""
        words, end = "", 0
        for found in self._marks.finditer(text):
            backslashes, mark = found[1], found[2]
            words += text[end : found.start()] + backslashes[: len(backslashes) // 2]
            end = found.end()
            if len(backslashes) % 2:
                words += mark
                continue
            if mark == _NOTHING:
                continue
            if words:
                yield words, False
            yield mark, True
            words = ""
        if words + text[end:]:
            yield words + text[end:], False

    def _prompt(
        self, text: str, add_special_tokens: bool, clips: Iterator[Any], sampling_rate: int | None
    ) -> Prompt:
        prompt = Prompt([], [], [], [], self.num_images(text), [])
        if add_special_tokens and not text.startswith(self.tokenizer.bos_token):
            self._append(prompt, [self.tokenizer.bos_token_id])
        span: Span | None = None
        number = 0
        for piece, is_mark in self.pieces(text):
            if is_mark and (opening := SPAN_MARKER.fullmatch(piece)):
                if span is not None:
                    raise ValueError(f"spans do not nest: {text!r}")
                span = Span(opening[1], None, [], [])
            elif is_mark and piece == SPAN_END:
                if span is None:
                    raise ValueError(f"{piece} has no counterpart in {text!r}")
                for read in self._read(span, prompt):
                    number += 1
                    self._append(prompt, *read, number)
                span = None
            elif is_mark and piece in NOUNS:
                if piece == AUDIO_MARKER:
                    encoder = None if span is None else span.encoder
                    features = self.prepare_clip(next(clips), encoder, sampling_rate=sampling_rate)
                    prompt.clips.append(features)
                if span is None:
                    number += 1
                    (read,) = self._read(Span(None, piece, [], []), prompt)
                    self._append(prompt, *read, number)
                elif span.marker or span.ids:
                    raise ValueError(f"in a span, one {NOUNS[piece]} comes first: {text!r}")
                else:
                    span = span._replace(marker=piece)
            else:
                ids = [self.tokenizer.convert_tokens_to_ids(piece)] if is_mark else self._ids(piece)
                if span is None:
                    self._append(prompt, ids)
                else:
                    span.ids.extend(ids)
                    span.words.extend([] if is_mark else [piece])
        if span is not None:
            raise ValueError(f"<span> has no counterpart in {text!r}")
        return prompt

    def _read(self, span: Span, prompt: Prompt) -> list[tuple[list[int], int]]:
        """Tokens that an encoder reads, and the encoder's place: once, or once for each of the spans that a
        long text becomes. The vectors of an image or of the prompt's last clip are image tokens."""
        usual = {IMAGE_MARKER: self.image_encoder, AUDIO_MARKER: self.audio_encoder, None: self.text_encoder}
        name = span.encoder or usual[span.marker]
        if name not in self.encoders:
            known = ", ".join(self.encoders) or "none"
            what = "text" if span.marker is None else f"{NOUNS[span.marker]}s"
            raise ValueError(
                f"no encoder {repr(name) if name else 'is there'} to read {what}; the model has: {known}"
            )
        sizes = self.encoders[name]
        num_vectors = 0
        if span.marker == AUDIO_MARKER:
            num_vectors = prompt.clips[-1].num_vectors
        elif span.marker == IMAGE_MARKER:
            num_vectors = sizes["num_patches"]
            if not num_vectors or name in self._audio_processors:
                raise ValueError(f"encoder {name!r} reads no images")
        longest = sizes["max_text_positions"]
        if "vocab_size" in sizes:
            own = self._own_tokenizers[name]
            texts = self._fitting_texts(name, own, "".join(span.words), longest)
            found = [[sizes["vocab_size"] + n for n in own.encode(text).ids] for text in texts]
        else:
            found = self._fitting_ids(name, span.ids, longest)
        found[0] = [self.image_token_id] * num_vectors + found[0]
        if not found[0]:
            raise ValueError("a span is empty")
        place = list(self.encoders).index(name) + 1
        return [(ids, place) for ids in found]

    def _fitting_ids(self, name: str, ids: list[int], longest: int) -> list[list[int]]:
        """Tokens in pieces that an encoder reads."""
        if len(ids) <= longest:
            return [ids]
        if self.overflow is None or not longest:
            raise _too_long(name, longest, len(ids))
        if self.overflow == "split":
            return [ids[first : first + longest] for first in range(0, len(ids), longest)]
        return [ids[-longest:] if self.overflow == "cut_left" else ids[:longest]]

    def _fitting_texts(self, name: str, own: Tokenizer, text: str, longest: int) -> list[str]:
        """A text in pieces that an encoder with a tokenizer of its own reads."""
        count = len(own.encode(text).ids)
        if self.overflow is None and count > longest:
            raise _too_long(name, longest, count)
        pieces = [_fitting_text(own, text, longest, keeps_end=self.overflow == "cut_left")]
        while self.overflow == "split" and (rest := text[sum(map(len, pieces)) :]):
            pieces.append(_fitting_text(own, rest, longest, keeps_end=False))
        return pieces

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text, in which nothing is a special token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _append(self, prompt: Prompt, ids: list[int], encoder: int = 0, number: int = 0) -> None:
        prompt.input_ids.extend([self.image_token_id] * len(ids) if encoder else ids)
        prompt.span_input_ids.extend(ids if encoder else [self.tokenizer.pad_token_id] * len(ids))
        prompt.span_encoders.extend([encoder] * len(ids))
        prompt.span_numbers.extend([number] * len(ids))


def _fitting_text(own: Tokenizer, text: str, longest: int, *, keeps_end: bool) -> str:
    """The beginning of a text, or its end, that has at most so many tokens."""
    if len(own.encode(text).ids) <= longest:
        return text
    offsets = own.encode(text, add_special_tokens=False).offsets
    for count in range(min(longest, len(offsets)), 0, -1):
        kept = text[offsets[-count][0] :] if keeps_end else text[: offsets[count - 1][1]]
        if kept and len(own.encode(kept).ids) <= longest:
            return kept
    raise ValueError(f"an encoder reads at most {longest} tokens, and a character has more")


def _too_long(name: str, longest: int, count: int) -> ValueError:
    return ValueError(f"encoder {name!r} reads at most {longest} tokens, a span has {count}")


def _flat_media(marker: str, media: Any, counts: Sequence[int]) -> list[Any]:
    """All images or clips in the order of the prompts, checked against the prompts' markers."""
    if media is None:
        given = []
    elif not isinstance(media, list | tuple):
        given = [media]
    elif media and all(isinstance(group, list | tuple) for group in media):
        lengths = [len(group) for group in media]
        if lengths != list(counts):
            raise ValueError(f"the prompts have {counts} {marker[1:-1]} marker(s), the lists {lengths}")
        given = [one for group in media for one in group]
    else:
        given = list(media)
    if (count := sum(counts)) != len(given):
        raise ValueError(
            f"the prompts have {count} {marker[1:-1]} marker(s), {len(given)} {NOUNS[marker]}(s) were given"
        )
    return given


def _padded(values: Sequence[int], width: int | None, filler: int, side: str) -> list[int]:
    padding = [filler] * (0 if width is None else width - len(values))
    return [*padding, *values] if side == "left" else [*values, *padding]


__all__ = ["MetaLMProcessor"]
