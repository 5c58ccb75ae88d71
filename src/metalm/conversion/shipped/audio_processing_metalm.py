"""Clips as training prepares them: files, bytes or samples to what an encoder of audio reads.

soundfile is needed for files, soxr for sampling rates other than the encoder's, and neither for samples at
that rate.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import transformers

try:  # in a try, or transformers asks for them before it loads this file
    import soundfile
except ImportError:
    soundfile = None
try:
    import soxr
except ImportError:
    soxr = None


FORMATS = (b"RIFF", b"fLaC", b"OggS")
"""First bytes of files; of those that training reads. The other is MP3."""
EXTRACTORS = ("ASTFeatureExtractor", "Wav2Vec2FeatureExtractor")
"""Classes of transformers that are ever made."""
SAMPLING_RATES = range(1_000, 400_001)
MAX_VALUES = 100_000_000
"""Decoded at once, of all channels."""
MAX_AMPLITUDE = 1000.0
MAX_SAMPLE_BYTES = 4
MAX_FILE_BYTES, URL_TIMEOUT_S = 256 << 20, 60
_UNKNOWN_LENGTH = 2**63 - 1  # what libsndfile answers for a FLAC that was written to a pipe


class Waveform(np.ndarray):
    """Samples [n] float32 of one channel, full scale is -1..1, that know their sampling rate."""

    sampling_rate: int

    @classmethod
    def of(cls, samples: np.ndarray, sampling_rate: int) -> Waveform:
        """
        Args:
            samples: [n] float32.
            sampling_rate: in hertz.
        """
        waveform = np.ascontiguousarray(samples, np.float32).view(cls)
        waveform.sampling_rate = sampling_rate
        return waveform


class ClipFeatures(NamedTuple):
    """What an encoder reads of a clip."""

    values: np.ndarray
    """[n] float32, the features end to end."""
    num_vectors: int


class MetaLMAudioProcessor:
    """Clips for one encoder."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """
        Args:
            settings: `audio` of the encoder in processor_config.json.

        Raises:
            ValueError: they name a feature extractor that is not known.
        """
        self._settings = settings
        self.sampling_rate, self.max_samples = settings["sampling_rate"], settings["max_samples"]
        extractor = dict(settings["extractor"])
        if (kind := extractor.pop("feature_extractor_type")) not in EXTRACTORS:
            raise ValueError(f"feature_extractor_type is {kind!r}, expected one of {', '.join(EXTRACTORS)}")
        self._extractor = getattr(transformers, kind)(sampling_rate=self.sampling_rate, **extractor)

    @property
    def longest_s(self) -> float:
        """Seconds of the longest clip; of what is longer, the beginning is read."""
        return self.max_samples / self.sampling_rate

    def prepare(self, clip: Any, sampling_rate: int | None = None) -> ClipFeatures:
        """One clip as in training: the mean of its channels, resampled, cut, and padded to one shape.

        Args:
            clip: see `open_clip`.
            sampling_rate: of samples that do not tell their own.

        Raises:
            ValueError: as `open_clip`, or it is too short for a vector.
            ImportError: as `open_clip`, or soxr is missing and the rate another than the encoder's.
        """
        opened = open_clip(clip, sampling_rate, longest_s=self.longest_s)
        rate = opened.sampling_rate
        leading = np.asarray(opened)[: math.ceil(self.longest_s * rate)]
        num_vectors = self._count(len(leading) * self.sampling_rate // rate)
        if not num_vectors:
            raise ValueError(
                f"a clip of {len(leading) / rate:.4g} s is too short: its encoder reads "
                f"{self._settings['min_samples'] / self.sampling_rate:.4g} s or more"
            )
        samples = _resampled(leading, rate, self.sampling_rate)[: self.max_samples]
        found = self._extractor(samples, sampling_rate=self.sampling_rate, return_tensors="np")
        features = found["input_values"][0]
        whole = np.zeros(self._settings["features"], np.float32)
        whole[: len(features)] = features
        return ClipFeatures(whole.ravel(), num_vectors)

    def _count(self, num_samples: int) -> int:
        """Vectors of a clip of so many samples."""
        if num_samples < self._settings["min_samples"]:
            return 0
        length = min(num_samples, self.max_samples)
        for kernel, stride in self._settings["convolutions"]:
            length = (length - kernel) // stride + 1
        return length if self._settings["convolutions"] else self._settings["num_patches"]


def open_clip(clip: Any, sampling_rate: int | None = None, *, longest_s: float) -> Waveform:
    """A clip at its own sampling rate, of one channel.

    Args:
        clip: samples [n], floats in -1..1 or integers of up to 32 bits over their whole range, as an array or
            in a dictionary of `array` and `sampling_rate`; or the path or the bytes of a file, or its URL.
        sampling_rate: of samples that do not tell their own, in hertz.
        longest_s: of a file no more than so many seconds are decoded.

    Raises:
        ValueError: it cannot be read, or its sampling rate is not known.
        ImportError: soundfile is missing, which files need.
    """
    if isinstance(clip, Waveform):
        return clip
    if isinstance(clip, Mapping):
        array, own_rate = clip.get("array"), clip.get("sampling_rate")
        sampling_rate = sampling_rate if own_rate is None else own_rate
        clip = next((clip[name] for name in ("bytes", "path") if clip.get(name)), clip)
        clip = clip if array is None else array
    if isinstance(clip, str) and clip.startswith(("http://", "https://", "data:")):
        with urlopen(clip, timeout=URL_TIMEOUT_S) as response:
            clip = response.read(MAX_FILE_BYTES)
    if isinstance(clip, str | Path):
        clip = Path(clip).read_bytes()
    if isinstance(clip, bytes | bytearray | memoryview):
        return _of_file(bytes(clip), longest_s)
    if sampling_rate is None:
        raise ValueError(
            "the sampling rate of a clip is not known: give sampling_rate beside it, or a dictionary of "
            "array and sampling_rate"
        )
    if sampling_rate not in SAMPLING_RATES:
        raise ValueError(f"the sampling rate of a clip is {sampling_rate!r}, expected hertz")
    return Waveform.of(_of_array(np.asarray(clip)), int(sampling_rate))


def _of_file(data: bytes, longest_s: float) -> Waveform:
    if data[:4] not in FORMATS and not _is_mp3(data):
        raise ValueError("a clip is no WAV, FLAC, Ogg or MP3 file")
    if soundfile is None:
        raise ImportError("files of clips need soundfile: pip install soundfile")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if rate not in SAMPLING_RATES or file.frames == _UNKNOWN_LENGTH:
                raise ValueError(f"a clip says that it has {file.frames} samples at {rate} Hz")
            frames = min(file.frames, math.ceil(longest_s * rate))
            if frames * file.channels > MAX_VALUES:
                raise ValueError(f"a clip has {file.channels} channels, more than are decoded")
            samples = file.read(frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"a clip cannot be decoded: {error}") from None
    if len(samples) < frames:
        raise ValueError(f"a clip ends after {len(samples)} of {frames} samples")
    _check_amplitude(samples)
    return Waveform.of(samples.mean(axis=1, dtype=np.float32), rate)


def _is_mp3(data: bytes) -> bool:
    """Whether it begins with tags, or with a frame's sync word and layer."""
    return data[:3] == b"ID3" or (
        len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 6 != 0
    )


def _of_array(samples: np.ndarray) -> np.ndarray:
    if samples.ndim != 1:
        raise ValueError(
            f"the samples of a clip have shape {list(samples.shape)}, expected one channel: take their mean"
        )
    if np.issubdtype(samples.dtype, np.signedinteger) and samples.itemsize <= MAX_SAMPLE_BYTES:
        samples = samples / -float(np.iinfo(samples.dtype).min)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"the samples of a clip are {samples.dtype}, expected floats in -1..1 or int8 to int32"
        )
    samples = samples.astype(np.float32)
    _check_amplitude(samples)
    return samples


def _check_amplitude(samples: np.ndarray) -> None:
    if not (np.abs(samples) <= MAX_AMPLITUDE).all():
        raise ValueError("the samples of a clip are no numbers, or far beyond -1..1")


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """At another rate, of floor(n * wanted / rate) samples."""
    if rate == wanted:
        return samples
    if soxr is None:
        raise ImportError(f"a clip of {rate} Hz for an encoder of {wanted} Hz needs soxr: pip install soxr")
    length = len(samples) * wanted // rate
    found = soxr.resample(samples, rate, wanted)[:length]
    return np.pad(found, (0, length - len(found)))


__all__ = ["MetaLMAudioProcessor", "Waveform", "open_clip"]
