"""Checks an audio file, and turns it into what a shard holds."""

from __future__ import annotations

from metalm.data.audio import Clip, audio_format, decode_clip, encode_flac, resample
from metalm.data.failures import BadSample


def prepare_clip(data: bytes, sampling_rate: int | None, max_seconds: float | None) -> tuple[str, bytes]:
    """Decodes a clip in full, and gives the suffix and the content of its shard member.

    The bytes stay as they are unless the clip is longer than wanted or of a higher sampling rate: then it is
    cut, resampled and encoded as FLAC, 16 bits, one channel.

    Raises:
        BadSample: as `decode_clip` and `encode_flac`; `short_audio` if it is empty.
    """
    clip = decode_clip(data)
    if not len(clip.samples):
        raise BadSample("short_audio")
    wanted = clip
    if max_seconds is not None:
        wanted = Clip(clip.samples[: round(max_seconds * clip.sampling_rate)], clip.sampling_rate)
    if sampling_rate is not None and clip.sampling_rate > sampling_rate:
        wanted = resample(wanted, sampling_rate)
    if len(wanted.samples) == len(clip.samples) and wanted.sampling_rate == clip.sampling_rate:
        return audio_format(data), data
    return "flac", encode_flac(wanted)
