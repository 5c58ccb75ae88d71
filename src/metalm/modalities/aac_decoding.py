"""The process that decodes clips of AAC: requests come on its standard input, answers go to its output."""

from __future__ import annotations

import io
import os
import sys

import av
import numpy as np

from metalm.errors import BadSample
from metalm.modalities.aac import ANSWER, REQUEST, is_stream, read_exactly

_CODECS = ("aac", "alac")
"""The only ones that are ever tried."""


def main() -> None:
    """Answer requests until there are no more."""
    # What FFmpeg or Python print by themselves must not stand among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            size, max_values = REQUEST.unpack(read_exactly(sys.stdin.buffer, REQUEST.size))
            data = read_exactly(sys.stdin.buffer, size)
        except EOFError:
            return
        try:
            samples, rate = decode(data, max_values)
            content = np.ascontiguousarray(samples, np.float32).tobytes()
            answers.write(ANSWER.pack(rate, samples.shape[1], len(content)) + content)
        except BadSample as bad:
            cause = bad.cause.encode()
            answers.write(ANSWER.pack(0, 0, len(cause)) + cause)
        answers.flush()


def decode(data: bytes, max_values: int) -> tuple[np.ndarray, int]:
    """Samples [n, channels] float32 of the first sound in a file, and their rate in hertz.

    Args:
        max_values: of all channels.

    Raises:
        BadSample: `undecodable_audio`, or `audio_bomb` for more values.
    """
    chunks: list[np.ndarray] = []
    num_values = 0
    try:
        form = "aac" if is_stream(data[:8]) else "mov"
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


if __name__ == "__main__":
    main()
