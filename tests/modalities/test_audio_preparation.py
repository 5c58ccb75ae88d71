"""Preparing clips: kept, cut or resampled, and what becomes of odd ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from metalm.data.storage.index import open_index
from metalm.errors import BadSample
from metalm.modalities.audio import decode_clip, prepare_clip

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


def test_what_cannot_be_kept_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="unsupported_rate"):
        prepare_clip(wav(0.5, 99_999), None, 0.1)
    with pytest.raises(BadSample, match="short_audio"):
        prepare_clip(wav(0.0, 16_000), None, None)
    with pytest.raises(BadSample, match="undecodable_audio"):
        prepare_clip(b"ID3 is no format of ours", None, None)


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
