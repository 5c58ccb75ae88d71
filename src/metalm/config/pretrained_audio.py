"""What a folder of transformers says about the clips of an audio encoder.

Two families are known: those that read mel frames in overlapping patches (AST), whose clips have one length;
and those that read samples through convolutions (Wav2Vec2, HuBERT, WavLM and others), where the pipeline says
how long a clip may be.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from metalm.config.plain_files import read_json_object
from metalm.errors import ConfigError

EXTRACTORS: dict[str, tuple[str, ...]] = {
    "ASTFeatureExtractor": ("num_mel_bins", "max_length", "do_normalize", "mean", "std"),
    "Wav2Vec2FeatureExtractor": ("do_normalize",),
}
"""Classes of transformers that are ever made of a folder's preprocessor_config.json, each of one family, and
which settings are taken from there."""
SAMPLING_RATES = range(1_000, 400_001)
"""In hertz."""
MEL_WINDOW_MS, MEL_HOP_MS = 25, 10
"""Length and distance of the mel frames."""


def reads_audio(definition: dict[str, Any]) -> bool:
    """Whether a model's config is that of an audio encoder."""
    return "conv_stride" in definition or "time_stride" in definition


def read_audio(
    definition: dict[str, Any], folder: Path, clip_seconds: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of `EncoderConfig.audio`, and the settings of the feature extractor.

    Raises:
        ConfigError: the folder's feature extractor is of another model, or `clip_seconds` does not fit.
    """
    path = folder / "preprocessor_config.json"
    processor = read_json_object(path, "the model's feature extractor")
    rate, kind = processor.get("sampling_rate"), processor.get("feature_extractor_type")
    if not isinstance(rate, int) or rate not in SAMPLING_RATES:
        raise ConfigError(f"{path}: sampling_rate is {rate!r}, expected a whole number of hertz")
    mel = "time_stride" in definition
    expected = "ASTFeatureExtractor" if mel else "Wav2Vec2FeatureExtractor"
    if kind != expected:
        raise ConfigError(f"{path} is of a {kind}, expected {expected}")
    audio = (
        _of_mel_frames(definition, processor, rate, clip_seconds)
        if mel
        else _of_samples(definition, processor, rate, clip_seconds)
    )
    return {"sampling_rate": rate, **audio}, processor


def _of_mel_frames(
    definition: dict[str, Any], processor: dict[str, Any], rate: int, clip_seconds: Any
) -> dict[str, Any]:
    if clip_seconds is not None:
        raise ConfigError("clip_seconds follows from the model, leave it out")
    frames, bins = definition["max_length"], definition["num_mel_bins"]
    for key, value in (("max_length", frames), ("num_mel_bins", bins)):
        if processor.get(key) != value:
            raise ConfigError(f"{key} is {value} in config.json, {processor.get(key)} in the preprocessor's")
    side = definition["patch_size"]
    across, along = definition["frequency_stride"], definition["time_stride"]
    return {
        "min_samples": rate * MEL_WINDOW_MS // 1000,
        "max_samples": (frames - 1) * (rate * MEL_HOP_MS // 1000) + rate * MEL_WINDOW_MS // 1000,
        "num_patches": ((bins - side) // across + 1) * ((frames - side) // along + 1),
        "features": (frames, bins),
        "weights_per_patch": side * side * definition["hidden_size"],
    }


def _of_samples(
    definition: dict[str, Any], processor: dict[str, Any], rate: int, clip_seconds: Any
) -> dict[str, Any]:
    if clip_seconds is None:
        raise ConfigError("clip_seconds is not given: the model reads samples, in clips of any length")
    if not isinstance(clip_seconds, int | float) or not 0 < clip_seconds < math.inf:
        raise ConfigError(f"clip_seconds is {clip_seconds!r}, expected a number of seconds")
    if definition.get("add_adapter"):
        raise ConfigError("the model has an adapter behind its layers (add_adapter), which is not supported")
    kernels, strides, widths = (definition[f"conv_{key}"] for key in ("kernel", "stride", "dim"))
    min_samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        min_samples = (min_samples - 1) * stride + kernel
    length = max_samples = int(clip_seconds * rate)
    if max_samples < min_samples:
        raise ConfigError(f"clip_seconds = {clip_seconds} is too short for one vector")
    for kernel, stride in zip(kernels, strides, strict=True):
        length = (length - kernel) // stride + 1
    weights = widths[-1] * definition["hidden_size"]
    for layer, (kernel, width) in enumerate(zip(kernels, widths, strict=True)):
        outputs = math.prod(strides[layer + 1 :])  # of this layer, for one vector
        weights += outputs * kernel * width * (widths[layer - 1] if layer else 1)
    return {
        "min_samples": min_samples,
        "max_samples": max_samples,
        "num_patches": length,
        "features": (max_samples,),
        "convolutions": tuple(zip(kernels, strides, strict=True)),
        "masks_padding": bool(processor.get("return_attention_mask", False)),
        "weights_per_patch": weights,
    }
