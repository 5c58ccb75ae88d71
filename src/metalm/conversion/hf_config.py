"""The JSON files of an exported folder: configs of model, generation and processor, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from metalm.config import DecoderConfig, EncoderConfig, PretrainedConfig, RunConfig
from metalm.config.model_schema import TEXT, AudioConfig, ImageConfig
from metalm.config.pretrained_folder import positions_before_text
from metalm.conversion.chat_template import chat_template
from metalm.data.documents.retokenize import load_retokenizer
from metalm.data.tokenizer import Tokenizer
from metalm.data.usual_readers import usual_readers
from metalm.errors import ConfigError
from metalm.modalities import modality_of_encoder

SMALLEST_TRANSFORMERS = "5.17.0"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
FORMAT_NAME = "metalm_format_version"
FORMAT_VERSION = 1
SHIPPED_MODALITIES = ("text", "image", "audio")
"""What encoders of the model code in `shipped/` read."""
AUTO_MAP = {
    "AutoConfig": "configuration_metalm.MetaLMConfig",
    "AutoModel": "modeling_metalm.MetaLMModel",
    "AutoModelForCausalLM": "modeling_metalm.MetaLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_metalm.MetaLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_metalm.MetaLMForConditionalGeneration",
}


def write_configs(config: RunConfig, tokenizer: Tokenizer, dtype: torch.dtype, folder: Path) -> None:
    """Write the configs of model, generation, processor and image processor, and the chat template.

    Raises:
        ConfigError: the model has encoders of images of different sizes.
    """
    _write(folder / "config.json", model_config(config, tokenizer, dtype))
    generation = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.document_id,
        "pad_token_id": tokenizer.pad_id,
        "transformers_version": _transformers_version(config),
    }
    _write(folder / "generation_config.json", generation)
    processor = processor_config(config)
    _write(folder / "processor_config.json", processor)
    write_image_processor(folder, processor["image_size"])
    write_own_tokenizers(config, tokenizer, folder)
    if config.model.encoders or config.data.example_source is not None:
        (folder / CHAT_TEMPLATE_NAME).write_text(chat_template(config))


def write_image_processor(folder: Path, image_size: int | None) -> None:
    """Write preprocessor_config.json, where the model reads images of so many pixels per side."""
    if image_size is not None:
        content = {
            "image_processor_type": "MetaLMImageProcessor",
            "auto_map": {"AutoImageProcessor": "image_processing_metalm.MetaLMImageProcessor"},
            "image_size": image_size,
        }
        _write(folder / "preprocessor_config.json", content)


def model_config(config: RunConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    model, decoder = config.model, config.model.decoder
    return {
        "model_type": "metalm",
        "architectures": ["MetaLMForConditionalGeneration"],
        "auto_map": AUTO_MAP,
        FORMAT_NAME: FORMAT_VERSION,
        "transformers_version": _transformers_version(config),
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.key_value_heads,
        "head_dim": decoder.head_size,
        "intermediate_size": decoder.feed_forward_size,
        "activation": decoder.activation,
        "normalization": decoder.normalization,
        "parallel_residual": decoder.parallel_residual,
        "norm": decoder.norm,
        "norm_eps": decoder.norm_eps,
        "biases": decoder.biases,
        "qkv_biases": decoder.qkv_biases,
        "positions": decoder.positions,
        "max_position_embeddings": decoder.max_positions or config.data.sequence_length,
        "rope_parameters": _rope_parameters(decoder),
        "scale_embedding": decoder.scale_embedding,
        "scale_docked_vectors": decoder.scale_docked_vectors,
        "spans": decoder.spans,
        "encoders": {name: _encoder(encoder) for name, encoder in sorted(model.encoders.items())},
        "image_encoder": usual_readers(config).get("image"),
        "image_token_id": tokenizer.image_id,
        "own_token_offset": model.vocab_size,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.document_id,
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": decoder.tied_output,
        "use_cache": True,
    }


def _transformers_version(config: RunConfig) -> str:
    """Of the code that the model needs: the smallest, or with encoders of transformers the one at hand."""
    own = all(encoder.pretrained is None for encoder in config.model.encoders.values())
    return SMALLEST_TRANSFORMERS if own else transformers.__version__


def processor_config(config: RunConfig) -> dict[str, Any]:
    """The content of processor_config.json."""
    encoders, readers = config.model.encoders, usual_readers(config)
    settings = {name: modality_of_encoder(one).exported_settings(one) for name, one in encoders.items()}
    chats = config.data.example_source
    sizes = {one["image_size"] for one in settings.values() if "image_size" in one}
    if len(sizes) > 1:
        raise ConfigError(f"encoders of images of different sizes ({sorted(sizes)}) cannot be exported")
    return {
        "processor_class": "MetaLMProcessor",
        "auto_map": {"AutoProcessor": "processing_metalm.MetaLMProcessor"},
        "encoders": {
            name: {
                "max_text_positions": encoder.max_text_positions,
                "num_patches": modality_of_encoder(encoder).max_vectors(encoder),
                **({"audio": settings[name]["audio"]} if "audio" in settings[name] else {}),
                **_own_vocabulary(config, encoder),
            }
            for name, encoder in sorted(encoders.items())
        },
        "image_encoder": readers.get("image"),
        "audio_encoder": readers.get("audio"),
        "text_encoder": readers.get(TEXT),
        "readers": readers,
        "image_size": next(iter(sizes), None),
        "overflow": None if chats is None else chats.overflow,
    }


def _own_vocabulary(config: RunConfig, encoder: EncoderConfig) -> dict[str, int]:
    if encoder.pretrained is None or not _has_own_tokenizer(encoder):
        return {}
    own = encoder.pretrained.definition["vocab_size"]
    return {"vocab_size": config.model.vocab_size, "own_vocab_size": own}


def _has_own_tokenizer(encoder: EncoderConfig) -> bool:
    return encoder.pretrained is not None and encoder.media is None


def write_own_tokenizers(config: RunConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the tokenizers of encoders of transformers that read text.

    Raises:
        DataError: as `load_retokenizer`.
    """
    for name, encoder in config.model.encoders.items():
        if encoder.pretrained is not None and _has_own_tokenizer(encoder):
            load_retokenizer(encoder, tokenizer)
            shutil.copyfile(encoder.pretrained.path / "tokenizer.json", folder / f"tokenizer_of_{name}.json")


def _rope_parameters(decoder: DecoderConfig) -> dict[str, Any]:
    """In transformers' terms, which every config of it has; `positions` says whether they are used."""
    scaling = decoder.rope_scaling
    share = {} if decoder.rope_share == 1.0 else {"partial_rotary_factor": decoder.rope_share}
    if scaling is None:
        return {"rope_type": "default", "rope_theta": decoder.rope_base, **share}
    return {
        **share,
        "rope_type": "llama3",
        "rope_theta": decoder.rope_base,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }


def _encoder(encoder: EncoderConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": encoder.num_layers,
        "hidden_size": encoder.hidden_size,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": encoder.feed_forward_size,
        "num_key_value_heads": encoder.key_value_heads,
        "activation": encoder.activation,
        "normalization": encoder.normalization,
        "norm": encoder.norm,
        "norm_eps": encoder.norm_eps,
        "biases": encoder.biases,
        "positions": encoder.positions,
        "rope_base": encoder.rope_base,
        "max_text_positions": encoder.max_text_positions,
        "relative_bias": encoder.relative_bias.model_dump() if encoder.relative_bias else None,
        "joint_layers": encoder.joint_layers,
        "connector": encoder.connector,
        "image_size": None,
        "patch_size": None,
        "audio": None,
        **modality_of_encoder(encoder).exported_settings(encoder),
        **(_pretrained(encoder.pretrained) if encoder.pretrained else {}),
    }


def exported_encoder(sizes: Mapping[str, Any]) -> EncoderConfig:
    """What of an encoder in config.json says what it reads."""
    image = audio = pretrained = None
    if sizes["image_size"] is not None:
        image = ImageConfig(image_size=sizes["image_size"], patch_size=sizes["patch_size"])
    if sizes["audio"] is not None:
        heard = dict(sizes["audio"])
        pretrained = PretrainedConfig(path=Path(), processor=heard.pop("extractor"))
        audio = AudioConfig.model_validate({**heard, "weights_per_patch": 1})
    return EncoderConfig(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        num_heads=sizes["num_attention_heads"],
        max_text_positions=sizes["max_text_positions"],
        image=image,
        audio=audio,
        pretrained=pretrained,
    )


def _pretrained(pretrained: PretrainedConfig) -> dict[str, Any]:
    return {
        "pretrained": pretrained.definition,
        "image_mean": pretrained.image_mean and list(pretrained.image_mean),
        "image_std": pretrained.image_std and list(pretrained.image_std),
        "first_position": positions_before_text(pretrained.definition),
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
