"""Clips: decoding with caps, resampling, features, rows of clips of several lengths."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from metalm.config.load import load_config
from metalm.config.model_schema import EncoderConfig
from metalm.config.schema import RunConfig, SourceConfig
from metalm.data.balance import span_costs
from metalm.data.checking import check_shards
from metalm.data.corpus import Corpus
from metalm.data.documents.pairs import PairMaker
from metalm.data.held_out import evaluation_batches, held_out_samples, pack_held_out
from metalm.data.lanes import Lane, Mixture
from metalm.data.order.sample_order import SampleOrder
from metalm.data.order.streams import Stream
from metalm.data.packing.whole import WholePacker
from metalm.data.preparation.chat_shards import prepare_chats
from metalm.data.preparation.example_shards import default_converts
from metalm.data.sources import open_sources
from metalm.data.storage.index import build_index
from metalm.data.tokenizer import Tokenizer
from metalm.errors import BadSample, ConfigError
from metalm.modalities import audio as audio_module
from metalm.modalities.audio import Clip, ClipReader, decode_clip, resample
from metalm.objectives.semi_causal import SemiCausal
from reference.pretrained import save_pretrained

RATE = 16_000


def tone(seconds: float, hertz: float = 440.0, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def encoded(samples: np.ndarray, kind: str = "WAV", rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    """Reads samples, at most 0.05 s; 20 of them make a vector."""
    return encoder_of("wav2vec2-masked", tmp_path_factory.mktemp("encoder"), clip_seconds=0.05)


def encoder_of(kind: str, folder: Path, **keys: Any) -> EncoderConfig:
    from metalm.config.pretrained_folder import fill_in_pretrained

    save_pretrained(kind, folder)
    content = {"model": {"encoders": {"audio": {"pretrained": {"path": str(folder), **keys}}}}}
    fill_in_pretrained(content)
    return EncoderConfig.model_validate(content["model"]["encoders"]["audio"])


def reader_of(encoder: EncoderConfig) -> ClipReader:
    assert encoder.audio is not None and encoder.pretrained is not None
    return ClipReader(encoder.audio, encoder.pretrained.processor)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_channels_are_averaged(kind: str) -> None:
    left, right = tone(0.3), 0.2 * tone(0.3, 700)
    clip = decode_clip(encoded(np.stack([left, right], axis=1), kind))
    assert clip.sampling_rate == RATE
    tolerance = 0.1 if kind == "OGG" else 1e-4
    np.testing.assert_allclose(clip.samples, (left + right) / 2, atol=tolerance)


def test_no_more_is_decoded_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(tone(2.0), "FLAC")
    assert len(decode_clip(data, max_seconds=0.5).samples) == RATE // 2
    assert len(decode_clip(data, max_seconds=9.0).samples) == 2 * RATE
    monkeypatch.setattr(audio_module, "MAX_VALUES", RATE)
    assert len(decode_clip(data, max_seconds=0.5).samples) == RATE // 2
    with pytest.raises(BadSample, match="audio_bomb"):
        decode_clip(data)


def test_an_hour_of_silence_in_a_small_file_is_not_decoded_whole(encoder: EncoderConfig) -> None:
    silence = encoded(np.zeros(RATE * 3600, np.float32), "FLAC")
    assert len(silence) < 2e6
    assert reader_of(encoder).read(silence).shape == (1, 800)


def in_floats(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def damaged_files() -> dict[str, bytes]:
    wav, flac = encoded(tone(0.2)), encoded(tone(0.2), "FLAC")
    return {
        "empty": b"",
        "text": b"not audio at all",
        "other format": encoded(tone(0.2), "AIFF"),
        "half a header": wav[:20],
        "cut flac": flac[: len(flac) // 2],
        "overwritten flac": flac[:300] + b"\xff" * 400 + flac[700:],
        "not a number": in_floats(np.array([0.1, np.nan, 0.2])),
        "far too loud": in_floats(3e38 * tone(0.2)),
        "rate of 1": wav[:24] + struct.pack("<I", 1) + wav[28:],
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_audio_is_a_bad_sample(name: str, encoder: EncoderConfig) -> None:
    with pytest.raises(BadSample, match="undecodable_audio"):
        reader_of(encoder).read(damaged_files()[name])


def test_a_flac_of_unknown_length_has_a_cause_of_its_own(encoder: EncoderConfig) -> None:
    """An encoder that writes to a pipe leaves the count of samples, 36 bits, at zero."""
    data = bytearray(encoded(tone(0.2), "FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    with pytest.raises(BadSample, match="unknown_length"):
        reader_of(encoder).count_vectors(bytes(data))


def test_noise_never_ends_in_anything_but_a_bad_sample(encoder: EncoderConfig) -> None:
    random, reader = np.random.default_rng(5), reader_of(encoder)
    for kind in ("WAV", "FLAC", "OGG"):
        whole = encoded(tone(0.2), kind)
        for _ in range(60):
            data = bytearray(whole[: random.integers(4, len(whole) + 1)])
            for place in random.integers(4, len(data) + 1, 8):
                data[place - 1] = random.integers(256)
            try:
                assert reader.read(bytes(data)).shape == (1, 800)
            except BadSample:
                continue


@pytest.mark.parametrize("rate", [8_000, 44_100, 16_000])
def test_resampling_keeps_the_tone_and_has_the_length_that_the_header_told(rate: int) -> None:
    clip = resample(Clip(tone(0.5, rate=rate), rate), RATE)
    assert len(clip.samples) == len(tone(0.5, rate=rate)) * RATE // rate
    middle = slice(1000, 7000)
    np.testing.assert_allclose(clip.samples[middle], tone(0.5)[middle], atol=1e-3)


@pytest.mark.parametrize("rate", [RATE, 11_025, 48_000])
@pytest.mark.parametrize("seconds", [0.003, 0.0213, 0.05, 0.2])
def test_vectors_counted_from_the_header_are_those_of_the_features(
    seconds: float, rate: int, encoder: EncoderConfig
) -> None:
    reader, data = reader_of(encoder), encoded(tone(seconds, rate=rate), rate=rate)
    features, decoded = reader.read(data), resample(decode_clip(data), RATE).samples
    assert encoder.audio is not None
    count = encoder.audio.count_patches(len(decoded))
    assert count == reader.count_vectors(data) <= reader.max_vectors == 39
    real = min(round(seconds * rate) * RATE // rate, 800)
    expected = transformers.Wav2Vec2FeatureExtractor()(
        resample(decode_clip(data, max_seconds=0.05), RATE).samples[:800],
        sampling_rate=RATE,
        return_tensors="np",
    )["input_values"]
    np.testing.assert_allclose(features[:, :real], expected, atol=1e-6)
    assert not features[:, real:].any()


def test_a_clip_without_a_vector_is_a_bad_sample(encoder: EncoderConfig, tmp_path: Path) -> None:
    for config in (encoder, encoder_of("ast", tmp_path)):
        with pytest.raises(BadSample, match="short_audio"):
            reader_of(config).count_vectors(encoded(tone(0.001)))


def test_an_extractor_of_another_name_is_never_made() -> None:
    audio = {"sampling_rate": RATE, "min_samples": 1, "max_samples": 9, "num_patches": 1, "features": [9]}
    from metalm.config.model_schema import AudioConfig

    config = AudioConfig.model_validate({**audio, "weights_per_patch": 1})
    with pytest.raises(ConfigError, match="is of a AutoModel, expected one of"):
        ClipReader(config, {"feature_extractor_type": "AutoModel"})


def test_settings_that_spoil_the_features_are_refused_or_left_out(tmp_path: Path) -> None:
    config = encoder_of("wav2vec2", tmp_path, clip_seconds=0.05)
    assert config.audio is not None and config.pretrained is not None
    processor, data = config.pretrained.processor, encoded(tone(0.02))
    expected = ClipReader(config.audio, processor).read(data)
    changed = processor | {"padding_side": "left", "padding_value": float("nan"), "feature_size": 2}
    np.testing.assert_array_equal(ClipReader(config.audio, changed).read(data), expected)
    mel = encoder_of("ast", tmp_path / "ast")
    assert mel.audio is not None and mel.pretrained is not None
    with pytest.raises(ConfigError, match="all of them finite"):
        ClipReader(mel.audio, mel.pretrained.processor | {"std": float("nan")})
    with pytest.raises(ConfigError, match="cannot be used"):
        ClipReader(mel.audio, mel.pretrained.processor | {"mean": "loud"})


SECONDS = (0.05, 0.02, 0.031, 0.2, 0.004)


@pytest.fixture(scope="module")
def audio_source(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., None]) -> Path:
    """Clips of five lengths, each a tone of its own; a damaged one and one that is too short."""
    folder = tmp_path_factory.mktemp("audio")
    samples = [
        {"flac": encoded(tone(SECONDS[n % 5], 200 + 50 * n), "FLAC"), "txt": f"tone {n} sounds".encode()}
        for n in range(25)
    ]
    samples.insert(7, {"wav": b"RIFFnothing", "txt": b"broken"})
    samples.insert(9, {"wav": encoded(tone(0.001)), "txt": b"click"})
    write_shard(folder / "a.tar", samples)
    index = build_index(folder, kind="audio_text")
    assert index.num_samples == 27
    return folder


def test_rows_hold_the_real_vectors_of_each_clip_and_resume(
    audio_source: Path, encoder: EncoderConfig, tokenizer: Tokenizer
) -> None:
    config = SourceConfig(path=audio_source, readers={"audio": "audio", "text": "audio"})
    (source,) = open_sources({"tones": config}, tokenizer, {"audio": encoder})
    assert encoder.audio is not None
    reader = reader_of(encoder)

    def packer_of(state: dict[str, Any] | None = None) -> WholePacker:
        order = SampleOrder(
            source.index, seed=1, source_name="tones", num_lanes=1, chunk_samples=8, shuffle_window=16
        )
        return WholePacker(
            source,
            order,
            0,
            maker=PairMaker(source, {"audio": reader}, {"audio": encoder}, 128),
            sequence_length=128,
            draws=Stream(1, "draws"),
            max_consecutive_failures=3,
            state=state,
        )

    packer, heard = packer_of(), set()
    for _ in range(20):
        resumed = packer_of(json.loads(json.dumps(packer.state())))
        row, again = packer.next_row(), resumed.next_row()
        spans = row.spans["audio"]
        np.testing.assert_array_equal(row.tokens, again.tokens)
        np.testing.assert_array_equal(spans.media, again.spans["audio"].media)
        assert len(spans.media) == len(spans.bounds) <= 128 // 39  # of whole clips, what all are computed as
        starts = [0, *row.document_ends[:-1]]
        for start, end, count, features in zip(
            starts, row.document_ends, spans.num_patches, spans.media, strict=True
        ):
            caption = tokenizer.decode(row.tokens[start + 1 + count : end - 1])
            number = int(caption.split()[1])
            heard.add(number)
            data = in_floats(tone(SECONDS[number % 5], 200 + 50 * number))
            assert count == reader.count_vectors(data)
            np.testing.assert_allclose(features, reader.read(data)[0], atol=1e-3)
    assert heard == set(range(25))
    assert packer.counters.skipped.keys() == {"undecodable_audio", "short_audio"}


@pytest.fixture
def run(audio_source: Path, tmp_path: Path, tokenizer_folder: Path) -> RunConfig:
    save_pretrained("ast", tmp_path / "ast")
    save_pretrained("wav2vec2", tmp_path / "wav2vec2")
    tones, mel = ({"path": str(audio_source), "readers": {"audio": name}} for name in ("wave", "spectrogram"))
    content = {
        "run": {"name": "audio"},
        "model": {
            "vocab_size": 300,
            "decoder": {"num_layers": 1, "hidden_size": 32, "num_heads": 2},
            "encoders": {
                "spectrogram": {"pretrained": {"path": str(tmp_path / "ast")}},
                "wave": {"pretrained": {"path": str(tmp_path / "wav2vec2"), "clip_seconds": 0.05}},
            },
        },
        "data": {
            "tokenizer": str(tokenizer_folder),
            "sequence_length": 64,
            "lanes": 1,
            "sources": {"tones": tones},
            "evaluation": {"tones": tones, "mel": mel},
        },
        "training": {
            "steps": 1,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "schedule": {"warmup_steps": 0},
        },
    }
    path = tmp_path / "audio.yaml"
    path.write_text(json.dumps(content))
    return load_config(path, [])


@pytest.mark.parametrize(("source", "encoder_name"), [("tones", "wave"), ("mel", "spectrogram")])
def test_exchanged_clips_stand_under_the_same_captions(
    source: str, encoder_name: str, run: RunConfig
) -> None:
    corpus = Corpus(run)
    held_out = corpus.held_out[source]
    packed = pack_held_out(corpus, held_out, 12)
    arguments = {"num_rows": 12, "packed": packed, "dp_rank": 0, "dp_size": 1, "tp_size": 2}
    whole = {
        wrong: list(evaluation_batches(corpus, held_out, SemiCausal(), **arguments, wrong_media=wrong))
        for wrong in (False, True)
    }
    captions = {
        wrong: [batch.labels[batch.loss_weights > 0].tolist() for batch in batches]
        for wrong, batches in whole.items()
    }
    clips = {
        wrong: torch.cat([share.media for batch in batches for share in batch.encoders[encoder_name].shares])
        for wrong, batches in whole.items()
    }
    without_placeholder = {
        wrong: [[t for t in row if t != 1] for row in rows] for wrong, rows in captions.items()
    }
    assert without_placeholder[False] == without_placeholder[True]
    assert sorted(clip.sum().item() for clip in clips[False]) == sorted(c.sum().item() for c in clips[True])
    assert len(clips[False]) >= 12
    assert not torch.equal(clips[False], clips[True])


def test_samples_to_listen_to_and_a_check_of_the_shards(
    audio_source: Path, tokenizer_folder: Path, encoder: EncoderConfig, run: RunConfig
) -> None:
    corpus = Corpus(run)
    samples = held_out_samples(corpus, corpus.held_out["tones"], 3)
    assert [sample.captions for sample in samples] == [(f"tone {n} sounds",) for n in range(3)]
    assert isinstance(samples[0].media, Clip) and len(samples[0].media.samples) == 800
    assert np.abs(span_costs(np.array([39, 5]), encoder) - span_costs(np.array([39, 39]), encoder)).max() == 0
    (check,) = check_shards(audio_source, tokenizer_folder, samples_per_shard=27)
    assert check.problems == ("sample 7: undecodable_audio",)


def test_chats_about_clips_are_prepared_and_packed(
    run: RunConfig, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A short clip counts as a whole one: a row of 64 holds one of at most 39 vectors."""
    lines = []
    for number in range(6):
        data = base64.b64encode(encoded(tone(0.01 + 0.005 * number))).decode()
        clip = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        content = [{"type": "text", "text": "what?"}, clip]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"fox {number}"}]
        lines.append(json.dumps({"messages": messages}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    chats = tmp_path / "chats"
    prepare_chats([tmp_path / "chats.jsonl"], chats, converts=default_converts(), settings={})
    source = SourceConfig(path=chats, readers={"audio": "wave"}, overflow="split")
    data = run.data.model_copy(update={"sources": {"chats": source}})
    lane = Lane(Mixture(Corpus(run.model_copy(update={"data": data}))), 0)
    heard = set()
    for _ in range(12):
        row = lane.next_row()
        (count,) = row.spans["wave"].num_patches
        words = tokenizer.decode(row.tokens[1 + count : -1])
        assert words.startswith("what?\n\nfox ")
        heard.add(words[-1])
    assert len(heard) == 6


def test_a_source_needs_an_encoder_of_its_kind(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tones\.readers\.image = 'wave', but that encoder has no `image` section"
    ):
        load_config(tmp_path / "audio.yaml", ["data.sources.tones.readers.image=wave"])
    with pytest.raises(ConfigError, match=r"39 patches, start, one caption token and end do not fit"):
        load_config(tmp_path / "audio.yaml", ["data.sequence_length=40"])
