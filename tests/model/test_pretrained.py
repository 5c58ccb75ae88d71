"""Encoders of transformers against transformers alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from metalm.batch import EncoderShare
from metalm.config.model_schema import EncoderConfig
from metalm.config.pretrained_audio import _of_mel_frames
from metalm.config.pretrained_folder import fill_in_pretrained
from metalm.errors import ConfigError
from metalm.kernels.attention import backend_counts, reset_backend_counts
from metalm.modalities.audio import ClipReader
from metalm.modalities.image import cut_patches
from metalm.model.encoder_parameters import encoder_adapter_weights
from metalm.model.pretrained import PretrainedEncoder, count_parameters, load_weights, trained_names
from reference.pretrained import AUDIO, MEAN, STD, VISION, save_pretrained, vision_model

TEXTS = ("bert", "roberta", "xlm-roberta", "electra")
CLIP_SECONDS = 0.05
LAST_LAYER = {
    "vit": "layers.2.",
    "beit": "layers.2.",
    "clip": "encoder.layers.2.",
    "siglip": "encoder.layers.2.",
}
LAST_LAYER |= dict.fromkeys(TEXTS, "encoder.layer.2.") | dict.fromkeys(AUDIO, "encoder.layers.2.")
LAST_LAYER["ast"] = "layers.2."
BEHIND_LAYERS = {"vit": "layernorm.", "beit": "layernorm.", "siglip": "post_layernorm.", "ast": "layernorm."}
BEHIND_LAYERS["wav2vec2-masked"] = "encoder.layer_norm."  # registered in front of the layers


def config_of(folder: Path, **keys: Any) -> EncoderConfig:
    content: dict[str, Any] = {"model": {"encoders": {"it": {"pretrained": {"path": str(folder)}, **keys}}}}
    fill_in_pretrained(content)
    return EncoderConfig.model_validate(content["model"]["encoders"]["it"])


def audio_config_of(kind: str, folder: Path, **keys: Any) -> EncoderConfig:
    """Of clips of 20 or of 39 vectors, whole ones."""
    pretrained = {"path": str(folder)} | ({} if kind == "ast" else {"clip_seconds": CLIP_SECONDS})
    return config_of(folder, **keys, pretrained=pretrained)


def loaded(config: EncoderConfig) -> PretrainedEncoder:
    encoder = PretrainedEncoder(config, 40)
    encoder.model.load_state_dict(load_weights(config), strict=False)
    return encoder


def without_connector(encoder: PretrainedEncoder) -> PretrainedEncoder:
    encoder.connector = torch.nn.Sequential(torch.nn.Linear(32, 32))
    torch.nn.init.eye_(encoder.connector[0].weight)
    torch.nn.init.zeros_(encoder.connector[0].bias)
    return encoder


def share_of(
    ids: torch.Tensor,
    positions: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    media: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> EncoderShare:
    return EncoderShare(
        token_ids=ids,
        positions=positions.long(),
        attention_start=start,
        attention_end=end,
        media=torch.empty(0, dtype=torch.uint8) if media is None else media,
        patch_slots=torch.empty(0, dtype=torch.long) if slots is None else slots,
        dropout_seeds=torch.zeros_like(ids),
        dropout_positions=torch.zeros_like(start),
        routes={},
    )


def image_share(pixels: np.ndarray, config: EncoderConfig, *, empty: bool = False) -> EncoderShare:
    """Images [n, H, W, 3] behind three elements of nothing; `empty`: places for them alone."""
    assert config.image is not None
    patches = torch.from_numpy(np.concatenate([cut_patches(image, config.image) for image in pixels]))
    length = 3 + len(patches)
    zeros = torch.zeros(length, dtype=torch.int32)
    slots = torch.arange(3, length)
    if empty:
        patches, slots = patches[:0], slots[:0]
    return share_of(zeros.long(), zeros, zeros, zeros, patches, slots)


@pytest.mark.parametrize("kind", VISION)
def test_patch_vectors_equal_those_of_transformers_alone(kind: str, tmp_path: Path) -> None:
    model = vision_model(save_pretrained(kind, tmp_path))
    config = config_of(tmp_path, trained_layers="none")
    pixels = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    normalised = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        expected = model(pixel_values=normalised.permute(0, 3, 1, 2)).last_hidden_state[:, -4:].flatten(0, 1)
        encoder = without_connector(loaded(config))
        reset_backend_counts()
        found = encoder(image_share(pixels, config))
    torch.testing.assert_close(found[3:], expected, atol=1e-5, rtol=0)
    assert not found[:3].any()
    # BEiT adds a dense bias to its scores, which the interval kernel has not.
    assert bool(backend_counts()) == (kind != "beit")


def in_floats(samples: np.ndarray) -> bytes:
    """A file of 16,000 Hz that loses nothing."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.mark.parametrize("kind", AUDIO)
def test_vectors_of_clips_equal_those_of_transformers_alone(kind: str, tmp_path: Path) -> None:
    """Clips of several lengths, with silence behind; where the model masks it, each clip without it."""
    model = save_pretrained(kind, tmp_path)
    config = audio_config_of(kind, tmp_path, trained_layers="none")
    assert config.audio is not None and config.pretrained is not None
    reader = ClipReader(config.audio, config.pretrained.processor)
    noise = np.random.default_rng(3).normal(0, 0.1, 800).astype(np.float32)
    clips = [noise[:length] for length in (800, 400, 613)]
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    features, places, expected = [], [], []
    with torch.no_grad():
        for clip in clips:
            data = in_floats(clip)
            count = reader.count_vectors(data)
            features.append(reader.read(data))
            places += range(count)
            values = extractor(clip, sampling_rate=16_000, return_tensors="pt")["input_values"]
            if kind not in ("ast", "wav2vec2-masked"):
                values = torch.nn.functional.pad(values, (0, 800 - values.shape[1]))
            found = model(input_values=values).last_hidden_state[0]
            expected.append(found[-count:] if kind == "ast" else found[:count])
            if kind == "wav2vec2-masked":
                assert len(found) == count
        slots = torch.arange(3, 3 + len(places))
        positions = torch.tensor([0, 0, 0, *places])
        nothing = torch.zeros(len(positions), dtype=torch.int32)
        media = torch.from_numpy(np.concatenate(features))
        encoder = without_connector(loaded(config))
        reset_backend_counts()
        vectors = encoder(share_of(nothing.long(), positions, nothing, nothing, media, slots))
    torch.testing.assert_close(vectors[3:], torch.cat(expected), atol=1e-5, rtol=0)
    assert not vectors[:3].any()
    # WavLM adds a dense bias to its scores.
    assert bool(backend_counts()) == (kind != "wavlm")


@pytest.mark.parametrize("kind", ("ast", "wav2vec2-masked"))
def test_a_share_without_clips_still_reaches_every_parameter(kind: str, tmp_path: Path) -> None:
    save_pretrained(kind, tmp_path)
    config = audio_config_of(kind, tmp_path)
    assert config.audio is not None
    encoder = loaded(config)
    nothing = torch.zeros(5, dtype=torch.int32)
    vectors = encoder(
        share_of(nothing.long(), nothing, nothing, nothing, torch.empty(0, *config.audio.features))
    )
    assert vectors.shape == (5, 40)
    (vectors[:0].sum() + 0 * vectors.sum()).backward()
    trained = trained_names(encoder.model, config)
    assert all(p.grad is not None for n, p in encoder.model.named_parameters() if n in trained)


@pytest.mark.parametrize(
    ("kind", "keys", "change", "message"),
    [
        ("ast", {"clip_seconds": 1.0}, {}, "clip_seconds follows from the model"),
        ("ast", {}, {"max_length": 30}, "max_length is 40 in config.json, 30"),
        (
            "ast",
            {},
            {"feature_extractor_type": "os.system"},
            "is of a os.system, expected ASTFeatureExtractor",
        ),
        ("wav2vec2", {}, {}, "clip_seconds is not given"),
        ("wav2vec2", {"clip_seconds": 0.001}, {}, "too short for one vector"),
        ("wav2vec2", {"clip_seconds": "long"}, {}, "clip_seconds is 'long', expected a number"),
        ("wav2vec2", {"clip_seconds": float("inf")}, {}, "clip_seconds is inf, expected a number"),
        ("wav2vec2", {"clip_seconds": 1.0}, {"sampling_rate": "16000"}, "sampling_rate is '16000', expected"),
        ("ast", {}, {"sampling_rate": float("inf")}, "sampling_rate is inf, expected"),
    ],
)
def test_clips_that_do_not_fit_the_model_are_refused(
    kind: str, keys: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_pretrained(kind, tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, pretrained={"path": str(tmp_path), **keys})


def test_a_model_whose_vectors_depend_on_the_batch_is_refused(tmp_path: Path) -> None:
    save_pretrained("hubert", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"conv_pos_batch_norm": True}))
    with pytest.raises(ConfigError, match="a model of type 'hubert' has batch norms"):
        PretrainedEncoder(audio_config_of("hubert", tmp_path), 40)


def test_the_longest_clip_fills_every_mel_frame() -> None:
    definition = {"num_mel_bins": 16, "patch_size": 4, "hidden_size": 8}
    definition |= {"frequency_stride": 4, "time_stride": 4}
    for frames in range(6, 1400):
        length = {"max_length": frames}
        audio = _of_mel_frames(definition | length, {"num_mel_bins": 16} | length, 16_000, None)
        assert (audio["max_samples"] - 400) // 160 + 1 == frames
        assert (audio["max_samples"] - 401) // 160 + 1 == frames - 1


@pytest.mark.parametrize("kind", TEXTS)
def test_packed_spans_equal_each_span_alone_in_transformers(kind: str, tmp_path: Path) -> None:
    model = save_pretrained(kind, tmp_path)
    config = config_of(tmp_path, trained_layers="none")
    assert config.max_text_positions == (64 if "roberta" in kind else 66)
    lengths, longest = (7, 64, 3), 80
    ids = torch.randint(5, 300, (longest,), generator=torch.Generator().manual_seed(1))
    positions, start, end = (torch.zeros(longest, dtype=torch.int32) for _ in range(3))
    expected, first = [], 0
    with torch.no_grad():
        for length in lengths:
            span = slice(first, first + length)
            positions[span], start[span], end[span] = torch.arange(length), first, first + length
            expected.append(model(input_ids=ids[None, span]).last_hidden_state[0])
            first += length
        share = share_of(ids, positions, start, end)
        encoder = without_connector(loaded(config))
        reset_backend_counts()
        found = encoder(share)
    torch.testing.assert_close(found[:first], torch.cat(expected), atol=1e-5, rtol=0)
    assert backend_counts() == {"tiled": 3}


@pytest.mark.parametrize("kind", (*VISION, *TEXTS, *AUDIO))
def test_the_last_layers_are_trained_and_no_others(kind: str, tmp_path: Path) -> None:
    save_pretrained(kind, tmp_path)
    of = audio_config_of if kind in AUDIO else (lambda _, folder, **keys: config_of(folder, **keys))
    encoder = PretrainedEncoder(of(kind, tmp_path, trained_layers=1), 40)
    trained = {name for name, p in encoder.model.named_parameters() if p.requires_grad}
    behind = BEHIND_LAYERS.get(kind)
    names = [name for name, _ in encoder.model.named_parameters()]
    assert trained == {
        n for n in names if n.startswith(LAST_LAYER[kind]) or (behind and n.startswith(behind))
    }
    assert all(p.requires_grad for p in encoder.connector.parameters())


def test_a_share_without_images_still_reaches_every_parameter(tmp_path: Path) -> None:
    save_pretrained("vit", tmp_path)
    config = config_of(tmp_path)
    encoder = loaded(config)
    vectors = encoder(image_share(np.zeros((1, 24, 24, 3), np.uint8), config, empty=True))
    assert vectors.shape == (7, 40)
    (vectors[:0].sum() + 0 * vectors.sum()).backward()
    trained = trained_names(encoder.model, config)
    assert all(p.grad is not None for n, p in encoder.model.named_parameters() if n in trained)


def test_what_no_vector_depends_on_is_not_trained_and_counted_as_frozen(tmp_path: Path) -> None:
    model = vision_model(save_pretrained("clip", tmp_path))
    config = config_of(tmp_path)
    trained, frozen = count_parameters(config.model_dump_json())
    assert trained + frozen == sum(p.numel() for p in model.parameters())
    assert frozen == sum(p.numel() for n, p in model.named_parameters() if n.startswith("post_layernorm"))


def test_recomputation_changes_no_gradient(tmp_path: Path) -> None:
    save_pretrained("vit", tmp_path)
    pixels = np.random.default_rng(2).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    gradients = []
    for recompute in (False, True):
        config = config_of(tmp_path, recompute=recompute)
        encoder = without_connector(loaded(config)).train()
        encoder(image_share(pixels, config)).square().sum().backward()
        gradients.append([p.grad for p in encoder.model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_training_mode_drops_nothing(tmp_path: Path) -> None:
    save_pretrained("roberta", tmp_path)
    encoder = PretrainedEncoder(config_of(tmp_path), 40).train()
    rates = [m.p for m in encoder.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates
    assert not any(rates)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = save_pretrained("vit", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_weights(config_of(tmp_path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_pretrained("vit", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weight\(s\), such as layernorm.weight"):
        load_weights(config_of(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoConfig": "x.Y", "AutoModel": "x.Z"}, "model_type": "mine"}, "no model that"),
        ({"image_size": [24, 36]}, "expected squares"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_pretrained("vit", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path)


def test_sizes_are_not_given_twice(tmp_path: Path) -> None:
    save_pretrained("vit", tmp_path)
    with pytest.raises(ConfigError, match=r"num_layers follow\(s\) from pretrained.path"):
        config_of(tmp_path, num_layers=3)


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip"])
def test_images_of_another_size_have_positions_as_transformers_interpolates_them(
    kind: str, tmp_path: Path
) -> None:
    model = vision_model(save_pretrained(kind, tmp_path))
    config = config_of(tmp_path, pretrained={"path": str(tmp_path), "image_size": 60})
    assert config.image is not None and (config.image.image_size, config.image.num_patches) == (60, 25)
    images = np.random.default_rng(1).integers(0, 256, (2, 60, 60, 3), np.uint8)
    pixels = ((torch.from_numpy(images) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        vectors = model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, -25:]
        found = without_connector(loaded(config))(image_share(images, config))
    torch.testing.assert_close(found[3:], vectors.flatten(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("beit", "has biases of relative positions"), ("bert", "the model reads no images")],
)
def test_another_image_size_is_refused_where_it_cannot_be(kind: str, message: str, tmp_path: Path) -> None:
    save_pretrained(kind, tmp_path)
    with pytest.raises(ConfigError, match=f"model.encoders.it.pretrained: image_size.*{message}"):
        config_of(tmp_path, pretrained={"path": str(tmp_path), "image_size": 48})


@pytest.mark.parametrize("kind", ["vit", "roberta"])
def test_lora_stands_beside_the_modules_that_it_names(kind: str, tmp_path: Path) -> None:
    save_pretrained(kind, tmp_path)
    name = "q_proj" if kind == "vit" else "query"
    config = config_of(tmp_path, adapter={"rank": 2, "targets": [name]})
    encoder = loaded(config)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad and "connector" not in name}
    assert len(trained) == 2 * 3 and all(f".{name}.lora_" in n for n in trained)
    assert count_parameters(config.model_dump_json())[0] == 3 * 2 * (32 + 32)
    assert encoder_adapter_weights(config) == 3 * 2 * (32 + 32)
    plain = loaded(config_of(tmp_path))
    plain.connector = encoder.connector
    for parameter in encoder.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        for layer in range(3):
            (module,) = [
                m for n, m in encoder.model.named_modules() if n.endswith(name) and f".{layer}." in f".{n}"
            ]
            (own,) = [
                m for n, m in plain.model.named_modules() if n.endswith(name) and f".{layer}." in f".{n}"
            ]
            own.weight += 2.0 * module.lora_b @ module.lora_a
        shares = [image_share(np.full((1, 24, 24, 3), 99, np.uint8), config)] if kind == "vit" else []
        if kind == "roberta":
            ids = torch.arange(5, 12)
            ends = torch.full((7,), 7, dtype=torch.int32)
            shares = [share_of(ids, torch.arange(7), torch.zeros_like(ends), ends)]
        torch.testing.assert_close(encoder(shares[0]), plain(shares[0]), atol=1e-5, rtol=0)


def test_a_target_that_no_module_has_is_refused(tmp_path: Path) -> None:
    save_pretrained("vit", tmp_path)
    with pytest.raises(ConfigError, match="no linear module of ViTModel has a name that ends in 'qkv'"):
        PretrainedEncoder(config_of(tmp_path, adapter={"targets": ["qkv"]}), 40)


def completed(folder: Path, base: EncoderConfig | None, **keys: Any) -> dict[str, Any]:
    """An encoder of a pipeline, of one that extends another's resolved configuration, or with other keys."""
    encoder = base.model_dump(mode="json") if base is not None else {"pretrained": {}}
    encoder["pretrained"] |= {"path": str(folder)} | keys.pop("pretrained", {})
    content: dict[str, Any] = {"model": {"encoders": {"it": encoder | keys}}}
    fill_in_pretrained(content)
    found: dict[str, Any] = EncoderConfig.model_validate(content["model"]["encoders"]["it"]).model_dump()
    return found


def test_a_complete_encoder_follows_its_folder_and_keys(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    save_pretrained("vit", one)
    save_pretrained("vit", other)
    changed = json.loads((other / "config.json").read_text()) | {"hidden_act": "relu"}
    (other / "config.json").write_text(json.dumps(changed))
    base = config_of(one)
    assert base.image is not None
    assert completed(one, base) == base.model_dump()
    assert completed(other, base) == completed(other, None) != base.model_dump()
    larger = {"image_size": 2 * base.image.image_size}
    assert completed(one, base, pretrained=larger) == completed(one, None, pretrained=larger)
    with pytest.raises(ConfigError, match=r"num_layers follow\(s\) from pretrained.path"):
        completed(one, base, num_layers=7)
    with pytest.raises(ConfigError, match=r"image follow\(s\) from pretrained.path"):
        completed(one, base, image={**base.image.model_dump(), **larger})
    gone = tmp_path / "gone"
    one.rename(gone)
    assert completed(one, base) == base.model_dump()
    with pytest.raises(ConfigError, match="is not there"):
        completed(one, base, pretrained=larger)


def test_a_complete_encoder_of_clips_follows_the_longest(tmp_path: Path) -> None:
    save_pretrained("wav2vec2", tmp_path)
    base = audio_config_of("wav2vec2", tmp_path)
    longer = {"clip_seconds": 2 * CLIP_SECONDS}
    assert completed(tmp_path, base) == base.model_dump()
    assert completed(tmp_path, base, pretrained=longer) == completed(tmp_path, None, pretrained=longer)
