"""Audio: bytes to clips to features, with caps that hold before anything is decoded.

A clip is the mean of its channels. Its features are those of the encoder's own feature extractor, padded to
one shape, so that clips make batches.
"""

from __future__ import annotations

import functools
import io
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from metalm.config.model_schema import AudioConfig, EncoderConfig
from metalm.config.pretrained_audio import EXTRACTORS, SAMPLING_RATES
from metalm.errors import BadSample, ConfigError
from metalm.modalities import aac
from metalm.modalities.modality import Board, Convert, Media

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from metalm.batch import EncoderShare

_UNKNOWN_LENGTH = 2**63 - 1  # what libsndfile answers for a FLAC that was written to a pipe
FORMATS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg"}
"""First bytes of the formats that are ever tried, whatever a member is called. The other is MP3."""
MAX_VALUES = 100_000_000
"""Decoded at once, of all channels: 19 minutes of a compact disc."""
MAX_AMPLITUDE = 1000.0
"""Float files may leave -1..1 by some factor, not by any."""
HEARD_SECONDS, HEARD_HERTZ = 30, 16_000
"""What people are given to hear of a clip, at most."""
PROOF_HERTZ = 48_000
"""Sampling rate of the clip on which exported models are proved, which is resampled for most."""


class Audio(Media):
    """Clips of one channel, for encoders of transformers."""

    name = "audio"
    kind = "audio_text"
    noun = "clip"
    exported_name = "audio_values"
    formats: ClassVar = {"wav": "wav", "flac": "flac", "ogg": "ogg", "mp3": "mp3"}
    converted_suffixes = aac.SUFFIXES
    other_suffixes = frozenset(
        (
            *("aif", "aiff", "amr", "ape", "mka"),
            *("oga", "opus", "webm", "wma", "wv"),
            *aac.SUFFIXES,
        )
    )

    def reader(self, encoder: EncoderConfig) -> ClipReader:
        assert encoder.pretrained is not None
        return ClipReader(_section(encoder), encoder.pretrained.processor)

    def no_media(self, encoder: EncoderConfig) -> np.ndarray:
        return np.empty((0, *_section(encoder).features), np.float32)

    def rows_of_media(self, num_vectors: np.ndarray) -> np.ndarray:
        return np.minimum(num_vectors, 1)

    def cost_lengths(self, lengths: np.ndarray, encoder: EncoderConfig) -> np.ndarray:
        return np.full_like(lengths, _section(encoder).num_patches)  # clips are padded to one length

    def max_vectors(self, encoder: EncoderConfig) -> int:
        return _section(encoder).num_patches

    def weights_per_vector(self, encoder: EncoderConfig) -> int:
        return _section(encoder).weights_per_patch

    def encode(self, model: Any, share: EncoderShare, encoder: EncoderConfig, dtype: torch.dtype) -> Tensor:
        import torch

        audio = _section(encoder)
        clips, places = share.media, share.positions[share.patch_slots]
        if not len(clips):
            clips, places = clips.new_zeros(1, *audio.features), places.new_zeros(1)
        clip_of_patch = (places == 0).cumsum(0) - 1
        lengths = torch.zeros(len(clips), dtype=torch.int64, device=places.device)
        lengths = lengths.index_add(0, clip_of_patch, torch.ones_like(places))
        vectors = encode_clips(model, clips.to(dtype), lengths, audio)
        return vectors.flatten(0, 1)[clip_of_patch * audio.num_patches + places]

    def try_out(self, model: Any, encoder: EncoderConfig, generator: torch.Generator) -> Tensor:
        """Of a whole and of half a clip."""
        import torch

        audio = _at_most_a_second(_section(encoder))
        counts = torch.tensor([audio.num_patches, (audio.num_patches + 1) // 2])
        clips = torch.randn(2, *audio.features, generator=generator)
        vectors = encode_clips(model, clips, counts, audio)
        return torch.cat([one[:count] for one, count in zip(vectors, counts, strict=True)])

    def vectors_of_zeros(self, model: Any, encoder: EncoderConfig) -> Tensor:
        import torch

        audio = _section(encoder)
        clip = torch.zeros(1, *audio.features)
        return model(input_values=clip).last_hidden_state[:, -audio.num_patches :]

    def describe_input(self, encoder: EncoderConfig) -> str:
        audio = _section(encoder)
        seconds = audio.max_samples / audio.sampling_rate
        return f"clips of up to {seconds:g} s at {audio.sampling_rate} Hz in {audio.num_patches} vectors"

    def exported_settings(self, encoder: EncoderConfig) -> dict[str, Any]:
        audio, pretrained = _section(encoder), encoder.pretrained
        assert pretrained is not None
        kind = pretrained.processor["feature_extractor_type"]
        names = ("feature_extractor_type", *EXTRACTORS[kind])
        extractor = {name: pretrained.processor[name] for name in names if name in pretrained.processor}
        sizes = audio.model_dump(mode="json", exclude={"weights_per_patch"})
        return {"audio": {**sizes, "extractor": extractor}}

    def exported_media(self, media: np.ndarray, encoder: EncoderConfig) -> np.ndarray:
        """[clips, values], the features of each end to end."""
        return media.reshape(len(media), -1)

    def proof_file(self, encoder: EncoderConfig) -> bytes:
        """A rising tone over a hum, shorter than the longest clip where that is a matter of seconds."""
        audio = _section(encoder)
        longest = min(audio.max_samples, audio.sampling_rate)
        seconds = max(audio.min_samples, 0.7 * longest) / audio.sampling_rate
        time = np.arange(math.ceil(seconds * PROOF_HERTZ) + 1) / PROOF_HERTZ
        samples = 0.4 * np.sin(2 * np.pi * (200 + 1500 * time) * time) + 0.2 * np.sin(2 * np.pi * 90 * time)
        return encode_flac(Clip(samples.astype(np.float32), PROOF_HERTZ))

    def decode(self, data: bytes | memoryview) -> Clip:
        return decode_clip(data)

    def show(
        self, board: Board, step: int, name: str, media: Any, lines: Sequence[str], *, first: bool
    ) -> None:
        """Once in a process: the clip stays the same, and is large."""
        if first:
            heard = resample(media, min(media.sampling_rate, HEARD_HERTZ))
            samples = heard.samples[: round(HEARD_SECONDS * heard.sampling_rate)]
            board.write_audio(step, name, samples, heard.sampling_rate)

    def add_preparation_options(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--resample",
            type=int,
            metavar="HERTZ",
            help="store clips of higher sampling rates at this, as FLAC",
        )
        parser.add_argument("--max-seconds", type=float, help="cut longer clips, and store them as FLAC")

    def preparation_settings(self, options: Namespace) -> dict[str, int | float | None]:
        if options.resample is not None and options.resample not in SAMPLING_RATES:
            raise ValueError(f"--resample must be from {SAMPLING_RATES[0]} to {SAMPLING_RATES[-1]}")
        return {"sampling_rate": options.resample, "max_seconds": options.max_seconds}

    def convert(self, **settings: Any) -> Convert:
        return functools.partial(prepare_clip, **settings)


@dataclass(frozen=True)
class Clip:
    """One channel of sound."""

    samples: np.ndarray  # [n] float32, full scale is -1..1
    sampling_rate: int
    """In hertz."""


def decode_clip(data: bytes | memoryview, *, max_seconds: float = math.inf) -> Clip:
    """The clip in the bytes of a file, at its own sampling rate.

    Args:
        max_seconds: decode no more than this.

    Raises:
        BadSample: `undecodable_audio`, `unknown_length`, or `audio_bomb` (too much to decode, by its header).
    """
    with _opened(data) as file:
        frames = min(file.frames, _longest(max_seconds, file.samplerate))
        if frames * file.channels > MAX_VALUES:
            raise BadSample("audio_bomb")
        samples = file.read(frames, dtype="float32", always_2d=True)
        if len(samples) < frames:
            raise BadSample("undecodable_audio")
        return _mixed(samples, file.samplerate)


def resample(clip: Clip, sampling_rate: int) -> Clip:
    """The clip at another rate, of floor(n * rate / own rate) samples."""
    if clip.sampling_rate == sampling_rate:
        return clip
    import soxr

    length = len(clip.samples) * sampling_rate // clip.sampling_rate
    found = soxr.resample(clip.samples, clip.sampling_rate, sampling_rate)[:length]
    return Clip(np.pad(found, (0, length - len(found))), sampling_rate)


class ClipReader:
    """What an audio encoder reads of the bytes of a pair's audio member."""

    def __init__(self, audio: AudioConfig, processor: dict[str, Any]) -> None:
        """
        Args:
            processor: the settings of transformers' feature extractor.

        Raises:
            ConfigError: it cannot be made of them, or a library for audio is not installed.
        """
        self._audio, self._seconds = audio, audio.max_samples / audio.sampling_rate
        self.max_vectors = audio.num_patches
        self._extractor = _feature_extractor(audio, processor)
        _libraries()

    def count_vectors(self, data: bytes | memoryview) -> int:
        """Vectors of the clip in the bytes of a file, by its header.

        Raises:
            BadSample: `undecodable_audio`, `unknown_length`, or `short_audio` without a vector.
        """
        with _opened(data) as file:
            return self._count(file.frames, file.samplerate)

    def read(self, data: bytes | memoryview) -> np.ndarray:
        """Features [1, ...] float32.

        Raises:
            BadSample: as `decode_clip` and `count_vectors`.
        """
        clip = decode_clip(data, max_seconds=self._seconds)
        self._count(len(clip.samples), clip.sampling_rate)
        leading = clip.samples[: _longest(self._seconds, clip.sampling_rate)]
        samples = resample(Clip(leading, clip.sampling_rate), self._audio.sampling_rate).samples
        whole = np.zeros((1, *self._audio.features), np.float32)
        found = self._extractor(
            samples[: self._audio.max_samples],
            sampling_rate=self._audio.sampling_rate,
            return_tensors="np",
        )["input_values"]
        whole[:, : found.shape[1]] = found
        return whole

    def _count(self, num_samples: int, sampling_rate: int) -> int:
        count = self._audio.count_patches(num_samples * self._audio.sampling_rate // sampling_rate)
        if not count:
            raise BadSample("short_audio")
        return count


def audio_format(data: bytes | memoryview) -> str:
    """One of FORMATS, or `mp3`, by its first bytes.

    Raises:
        BadSample: `undecodable_audio`.
    """
    head = bytes(data[:4])
    if head in FORMATS:
        return FORMATS[head]
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6):
        return "mp3"  # behind tags, or by the first frame's sync word and layer
    raise BadSample("undecodable_audio")


def encode_flac(clip: Clip) -> bytes:
    """The clip as 16-bit FLAC.

    Raises:
        BadSample: `unsupported_rate` of FLAC, such as 99999 Hz.
    """
    soundfile, _ = _libraries()
    file = io.BytesIO()
    try:
        soundfile.write(file, clip.samples, clip.sampling_rate, format="FLAC", subtype="PCM_16")
    except soundfile.LibsndfileError:
        raise BadSample("unsupported_rate") from None
    return file.getvalue()


def encode_wav(clip: Clip) -> bytes:
    """The clip as a file that loses nothing."""
    soundfile, _ = _libraries()
    file = io.BytesIO()
    soundfile.write(file, clip.samples, clip.sampling_rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def encode_clips(model: Any, features: Tensor, lengths: Tensor, audio: AudioConfig) -> Tensor:
    """Vectors [C, num_patches, D] of clips [C, ...], of which the first `lengths` [C] are real."""
    import torch

    mask = {}
    if audio.masks_padding:
        # The model takes a mask over samples and derives that of vectors: any length with as many will do.
        samples = lengths
        for kernel, stride in reversed(audio.convolutions):
            samples = (samples - 1) * stride + kernel
        mask["attention_mask"] = (
            torch.arange(audio.max_samples, device=features.device) < samples[:, None]
        ).long()
    found = model(input_values=features, **mask)
    return found.last_hidden_state[:, -audio.num_patches :]


def _at_most_a_second(audio: AudioConfig) -> AudioConfig:
    """Clips that are long enough to try, where the model takes any length."""
    length = min(audio.max_samples, max(audio.sampling_rate, audio.min_samples))
    if not audio.convolutions:
        return audio
    sizes = {"max_samples": length, "features": (length,), "num_patches": audio.count_patches(length)}
    return audio.model_copy(update=sizes)


def prepare_clip(data: bytes, sampling_rate: int | None, max_seconds: float | None) -> tuple[str, bytes]:
    """Decodes a clip in full, and gives the suffix and the content of its shard member.

    The bytes stay as they are unless the clip is longer than wanted, of a higher sampling rate or in AAC:
    then it is cut, resampled and encoded as FLAC, 16 bits, one channel; as WAV of floats, where it was one
    that goes beyond -1..1, which FLAC would clip.

    Raises:
        BadSample: as `decode_clip`, `decode_aac` and `encode_flac`; `short_audio` if nothing is left.
        ConfigError: as `decode_aac`.
    """
    is_aac = aac.is_aac(data)
    clip = _decode_aac(data) if is_aac else decode_clip(data)
    wanted = clip
    if max_seconds is not None:
        wanted = Clip(clip.samples[: round(max_seconds * clip.sampling_rate)], clip.sampling_rate)
    # What a lossy codec or resampling adds to full scale is clipped, as players do.
    is_loud = not is_aac and audio_format(data) == "wav" and bool((np.abs(wanted.samples) > 1).any())
    if sampling_rate is not None and clip.sampling_rate > sampling_rate:
        wanted = resample(wanted, sampling_rate)
    if not len(wanted.samples):
        raise BadSample("short_audio")
    is_whole = len(wanted.samples) == len(clip.samples) and wanted.sampling_rate == clip.sampling_rate
    if is_whole and not is_aac:
        return audio_format(data), data
    if is_loud:
        return "wav", encode_wav(wanted)
    return "flac", encode_flac(wanted)


def _section(encoder: EncoderConfig) -> AudioConfig:
    assert encoder.audio is not None
    return encoder.audio


@contextmanager
def _opened(data: bytes | memoryview) -> Iterator[Any]:
    """A file whose header is sound."""
    soundfile, _ = _libraries()
    audio_format(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.samplerate not in SAMPLING_RATES:
                raise BadSample("undecodable_audio")
            if file.frames == _UNKNOWN_LENGTH:
                raise BadSample("unknown_length")
            yield file
    except soundfile.LibsndfileError:
        raise BadSample("undecodable_audio") from None


def _decode_aac(data: bytes) -> Clip:
    samples, sampling_rate = aac.decode_aac(data, MAX_VALUES)
    if sampling_rate not in SAMPLING_RATES:
        raise BadSample("undecodable_audio")
    return _mixed(samples, sampling_rate)


def _mixed(samples: np.ndarray, sampling_rate: int) -> Clip:
    """The mean of channels [n, channels]."""
    if not (np.abs(samples) <= MAX_AMPLITUDE).all():
        raise BadSample("undecodable_audio")
    return Clip(samples.mean(axis=1, dtype=np.float32), sampling_rate)


def _longest(seconds: float, sampling_rate: int) -> int:
    """Samples of so many seconds."""
    return math.ceil(min(seconds * sampling_rate, sys.maxsize))


def _libraries() -> tuple[Any, Any]:
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ConfigError(f"audio needs {error.name}: pip install 'metalm[audio]'") from None
    return soundfile, soxr


def _feature_extractor(audio: AudioConfig, processor: dict[str, Any]) -> Any:
    """transformers' own, of which only what concerns the features is taken from the folder."""
    kind = processor.get("feature_extractor_type")
    if kind not in EXTRACTORS:
        raise ConfigError(f"pretrained.processor is of a {kind}, expected one of {', '.join(EXTRACTORS)}")
    import transformers

    settings = {name: processor[name] for name in EXTRACTORS[kind] if name in processor}
    try:
        extractor = getattr(transformers, kind)(sampling_rate=audio.sampling_rate, **settings)
        tried = np.linspace(-1, 1, audio.max_samples, dtype=np.float32)
        found = extractor(tried, sampling_rate=audio.sampling_rate, return_tensors="np")["input_values"]
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"pretrained.processor cannot be used: {error}") from None
    if found.shape != (1, *audio.features) or not np.isfinite(found).all():
        raise ConfigError(
            f"pretrained.processor makes features of shape {list(found.shape[1:])}, "
            f"expected {list(audio.features)}, all of them finite"
        )
    return extractor
