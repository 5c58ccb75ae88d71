"""Preparing clips: kept, cut or resampled, and what becomes of odd ones."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import webdataset

from metalm.data.sources import open_source
from metalm.data.storage.index import open_index
from metalm.data.storage.shard_scan import FORMATS
from metalm.errors import BadSample, ConfigError
from metalm.modalities import aac
from metalm.modalities.aac import _DECODER, decode_aac
from metalm.modalities.audio import Clip, decode_clip, encode_wav, prepare_clip
from mutations import mutate_bytes

RunTool = Callable[..., tuple[int, str, str]]


def wav(seconds: float, rate: int, channels: int = 1) -> bytes:
    samples = 0.5 * np.sin(np.arange(round(seconds * rate)) * 440 * 2 * np.pi / rate)
    file = io.BytesIO()
    soundfile.write(file, np.stack([samples] * channels, axis=1), rate, format="WAV")
    return file.getvalue()


def test_a_clip_that_fits_stays_as_it_is() -> None:
    data = wav(0.5, 16_000, channels=2)
    assert prepare_clip(data, 16_000, 1.0) == ("wav", data)
    assert prepare_clip(data, None, None) == ("wav", data)
    assert prepare_clip(wav(0.1, 8_000), 16_000, None) == ("wav", wav(0.1, 8_000))


def test_a_clip_is_cut_and_resampled() -> None:
    suffix, data = prepare_clip(wav(2.0, 48_000, channels=2), 16_000, 0.5)
    clip = decode_clip(data)
    assert (suffix, clip.sampling_rate, len(clip.samples)) == ("flac", 16_000, 8_000)
    expected = decode_clip(wav(0.5, 16_000)).samples
    np.testing.assert_allclose(clip.samples[500:-500], expected[500:-500], atol=2e-3)


def test_what_is_louder_than_flac_holds_is_kept_as_it_is() -> None:
    loud = encode_wav(Clip(3 * decode_clip(wav(1.0, 48_000)).samples, 48_000))
    suffix, data = prepare_clip(loud, 16_000, None)
    assert suffix == "wav"
    expected = decode_clip(prepare_clip(wav(1.0, 48_000), 16_000, None)[1]).samples
    np.testing.assert_allclose(decode_clip(data).samples, 3 * expected, atol=1e-3)
    assert np.abs(3 * expected).max() > 1


def test_what_cannot_be_kept_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="unsupported_rate"):
        prepare_clip(wav(0.5, 99_999), None, 0.1)
    for empty, rate, most in ((wav(0.0, 16_000), 8_000, None), (wav(0.5, 16_000), None, 1e-9)):
        with pytest.raises(BadSample, match="short_audio"):
            prepare_clip(empty, rate, most)
    with pytest.raises(BadSample, match="undecodable_audio"):
        prepare_clip(b"ID3 is no format of ours", None, None)


def mp3(seconds: float, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    samples, _ = soundfile.read(io.BytesIO(wav(seconds, rate)))
    soundfile.write(file, samples, rate, format="MP3")
    return file.getvalue()


def m4a(seconds: float, rate: int = 16_000, *, codec: str = "aac", form: str = "ipod") -> bytes:
    """As FFmpeg writes it."""
    file = io.BytesIO()
    samples, _ = soundfile.read(io.BytesIO(wav(seconds, rate)), dtype="float32")
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def loudest_hertz(samples: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples))


def test_an_mp3_stays_as_it_is_and_is_heard() -> None:
    data = mp3(2.0)
    assert prepare_clip(data, None, None) == ("mp3", data)
    tagged = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + data
    assert prepare_clip(tagged, None, None) == ("mp3", tagged)
    clip = decode_clip(data)
    assert clip.sampling_rate == 16_000 and 32_000 <= len(clip.samples) < 32_000 + 3 * 1152
    assert abs(loudest_hertz(clip.samples, 16_000) - 440) < 2
    suffix, cut = prepare_clip(data, 8_000, 0.5)
    assert (suffix, len(decode_clip(cut).samples)) == ("flac", 4_000)


@pytest.mark.parametrize(
    ("codec", "form"), [("aac", "ipod"), ("aac", "mp4"), ("aac", "adts"), ("alac", "ipod")]
)
def test_a_clip_of_aac_becomes_flac(codec: str, form: str) -> None:
    suffix, data = prepare_clip(m4a(2.0, codec=codec, form=form), None, None)
    clip = decode_clip(data)
    assert (suffix, clip.sampling_rate) == ("flac", 16_000)
    assert 32_000 <= len(clip.samples) < 32_000 + 3 * 1024
    assert abs(loudest_hertz(clip.samples, 16_000) - 440) < 2
    assert abs(np.abs(clip.samples[4000:-4000]).max() - 0.5) < 0.03


def test_clips_of_mp3_and_m4a_are_prepared_and_read(run_tool: RunTool, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for number, (name, data) in enumerate({"a.mp3": mp3(0.5), "b.m4a": m4a(0.5), "c.M4A": b"ftyp"}.items()):
        (tmp_path / "clips" / name).write_bytes(data)
        (tmp_path / "clips" / name).with_suffix(".txt").write_text(f"number {number}")
    code, out, err = run_tool("prepare_audio_text.py", tmp_path / "clips", "--out", tmp_path / "out")
    assert code == 0, err
    assert "dropped: undecodable_audio" in out
    source = open_source("clips", tmp_path / "out", None)
    assert source.index.num_samples == 2
    for location in source.index.locate(np.arange(2)):
        source.try_out(location)
        assert FORMATS[location.format] in ("mp3", "flac")


def test_without_its_package_aac_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"m4a and aac need the package av: .*metalm\[m4a\]"):
        prepare_clip(m4a_head(), None, None)


def m4a_head() -> bytes:
    return b"\0\0\0\x1cftypM4A "


@pytest.mark.parametrize("make", [mp3, m4a])
def test_mutated_clips_are_decoded_or_bad_samples(make: Callable[[float], bytes]) -> None:
    """FFmpeg crashes of some in AAC: of each of them in its own process."""
    content, chance, bad = make(0.3), random.Random(4), 0
    for _ in range(150):
        try:
            prepare_clip(mutate_bytes(content, chance), None, None)
        except BadSample as error:
            bad += 1
            assert error.cause in ("undecodable_audio", "short_audio", "unknown_length", "audio_bomb")
    assert bad > 5


def test_a_decoder_that_crashes_is_one_bad_sample_and_the_next_clip_is_decoded() -> None:
    crash = "import os, signal, sys; sys.stdin.buffer.read(16); os.kill(os.getpid(), signal.SIGSEGV)"
    _DECODER.close()
    _DECODER._child = subprocess.Popen(
        [sys.executable, "-c", crash], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with pytest.raises(BadSample, match="undecodable_audio"):
        decode_aac(m4a(0.5), max_values=10**6)
    assert decode_aac(m4a(0.5), max_values=10**6)[1] == 16_000


def test_a_clip_that_takes_for_ever_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aac, "_MOST_SECONDS", 0.5)
    _DECODER.close()
    _DECODER._child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with pytest.raises(BadSample, match="undecodable_audio"):
        decode_aac(m4a(0.5), max_values=10**6)


def test_too_much_to_decode_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="audio_bomb"):
        decode_aac(m4a(0.5), max_values=4000)


def test_folders_of_files_and_of_tars_give_the_same_pairs(run_tool: RunTool, tmp_path: Path) -> None:
    files, tars = tmp_path / "files", tmp_path / "tars"
    files.mkdir()
    tars.mkdir()
    with webdataset.TarWriter(str(tars / "00000.tar"), encoder=False) as writer:
        for number in range(3):
            data = wav(0.1 * (number + 1), 16_000)
            (files / f"{number}.wav").write_bytes(data)
            (files / f"{number}.txt").write_text(f"number {number}")
            writer.write({"__key__": str(number), "wav": data, "txt": f"number {number}".encode()})
    (files / "bad.flac").write_bytes(b"fLaC")
    (files / "bad.txt").write_text("bad")
    for name in ("files", "tars"):
        code, out, err = run_tool("prepare_audio_text.py", tmp_path / name, "--out", tmp_path / f"{name}_out")
        assert code == 0, err
        index = open_index(tmp_path / f"{name}_out")
        assert (index.kind, index.num_samples) == ("audio_text", 3)
        assert ("undecodable_audio" in out) == (name == "files")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resample", 500), "--resample must be from 1000 to 400000"),
        (("--max-seconds", "inf"), "all numbers must be positive"),
        (("--shard-clips", 0), "all numbers must be positive"),
    ],
)
def test_wrong_options_are_refused(
    options: tuple[object, ...], message: str, run_tool: RunTool, tmp_path: Path
) -> None:
    code, _, err = run_tool("prepare_audio_text.py", tmp_path, "--out", tmp_path / "out", *options)
    assert code == 64 and message in err
