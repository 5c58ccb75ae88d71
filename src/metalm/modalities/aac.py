"""Clips in AAC or ALAC, such as .m4a, which libsndfile does not read: preparations decode them, once."""

from __future__ import annotations

import io

import numpy as np

from metalm.errors import BadSample, ConfigError

SUFFIXES = frozenset(("aac", "m4a", "m4b", "mp4"))
_CODECS = ("aac", "alac")
"""The only ones that are ever tried."""


def is_aac(data: bytes | memoryview) -> bool:
    """Whether it begins as a file of MPEG-4 (`ftyp`) or a stream of AAC does."""
    head = bytes(data[:8])
    return head[4:] == b"ftyp" or _is_stream(head)


def decode_aac(data: bytes, max_values: int) -> tuple[np.ndarray, int]:
    """Samples [n, channels] float32 of the first sound in a file, and their rate in hertz.

    Args:
        max_values: of all channels.

    Raises:
        BadSample: `undecodable_audio`, or `audio_bomb` for more values.
        ConfigError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise ConfigError("m4a and aac need the package av: pip install 'metalm[m4a]'") from None
    chunks: list[np.ndarray] = []
    num_values = 0
    try:
        form = "aac" if _is_stream(data[:8]) else "mov"
        with av.open(io.BytesIO(data), "r", form, metadata_errors="ignore") as container:
            codec = container.streams.audio[0].codec_context
            if codec.name not in _CODECS:
                raise BadSample("undecodable_audio")
            codec.thread_count = 1
            resampler = av.AudioResampler(format="fltp")
            kinds = set()
            for decoded in container.decode(audio=0):
                # Of a damaged file, channels and rate may change on the way, or be none.
                kinds.add((decoded.layout.name, decoded.format.name, decoded.sample_rate))
                if len(kinds) > 1 or not decoded.layout.nb_channels or not decoded.samples:
                    raise BadSample("undecodable_audio")
                for frame in resampler.resample(decoded):
                    chunks.append(frame.to_ndarray())
                    num_values += chunks[-1].size
                    if num_values > max_values:
                        raise BadSample("audio_bomb")
            return np.concatenate(chunks, axis=1).T, codec.sample_rate
    except BadSample:
        raise
    except Exception:  # of a damaged file, whatever FFmpeg's demuxers and decoders raise
        raise BadSample("undecodable_audio") from None


def _is_stream(head: bytes) -> bool:
    return head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xF6 == 0xF0
