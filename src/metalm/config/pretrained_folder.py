"""What a folder of transformers says about an encoder: its sizes, and how its images or clips are prepared.

Read once, when a pipeline is, and kept in the run's config: later only the weights are read from the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metalm.config.foreign_folder import read_foreign_config
from metalm.config.plain_files import read_json_object
from metalm.config.pretrained_audio import read_audio, reads_audio
from metalm.errors import ConfigError, MetaLMError
from metalm.regular_files import path_exists

DERIVED = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "ffn_hidden_size",
    "max_text_positions",
    "image",
    "audio",
)
"""Keys of an encoder that follow from the folder."""
_FILLED_IN = ("definition", "image_mean", "image_std", "processor")
"""Those of `pretrained`."""

_BIASES_BY_WINDOW = ("use_relative_position_bias", "use_shared_relative_position_bias")
"""BEiT's, whose tables are as large as the grid of patches."""

_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm")
"""Kinds of models whose positions begin behind the padding token's id."""


def fill_in_pretrained(content: dict[str, Any]) -> None:
    """Complete every encoder with `pretrained.path` in the content of a pipeline, in place.

    The configuration of a run, as the base of another pipeline, is complete. Its folder is read again all the
    same, for what has been changed since, such as its path; without the folder it stays as it is.

    Raises:
        ConfigError: a folder is no model of transformers, or a key that follows from it is given.
    """
    model = content.get("model")
    encoders = model.get("encoders") if isinstance(model, dict) else None
    for name, encoder in encoders.items() if isinstance(encoders, dict) else ():
        pretrained = encoder.get("pretrained") if isinstance(encoder, dict) else None
        if not isinstance(pretrained, dict) or not isinstance(pretrained.get("path"), str):
            continue  # not of transformers, or a mistake that validation names
        folder = Path(pretrained["path"])
        try:
            if given := _typed(encoder):
                raise ConfigError(f"{', '.join(given)} follow(s) from pretrained.path, leave them out")
            if pretrained.get("definition") and not path_exists(folder / "config.json"):
                _check_image_size(pretrained, folder)
                continue
            for filled, keys in ((encoder, DERIVED), (pretrained, _FILLED_IN)):
                for key in keys:
                    filled.pop(key, None)
            definition = _read_definition(folder)
            if (side := pretrained.get("image_size")) is not None:
                _resize(definition, side)
            encoder.update(_sizes(definition))
            if reads_audio(definition):
                seconds = pretrained.get("clip_seconds")
                encoder["audio"], pretrained["processor"] = read_audio(definition, folder, seconds)
            elif pretrained.get("clip_seconds") is not None:
                raise ConfigError("clip_seconds is given, but the model reads no audio: leave it out")
            elif encoder["image"]:
                pretrained.update(_pixels(folder))
        except ConfigError as error:
            raise ConfigError(f"model.encoders.{name}.pretrained: {error}") from None
        except MetaLMError:
            raise
        except Exception as error:  # arithmetic with what should have been sizes
            raise ConfigError(
                f"model.encoders.{name}.pretrained: the configs in {folder} do not fit together ({error!r})"
            ) from None
        pretrained["definition"] = definition


def _typed(encoder: dict[str, Any]) -> list[str]:
    """The derived keys that somebody has given: of a complete encoder, those that are not as derived."""
    given = {key: encoder[key] for key in DERIVED if key in encoder}
    definition = encoder["pretrained"].get("definition")
    if not definition:
        return list(given)
    expected = _sizes(definition) | {"audio": given.get("audio")}  # this needs the folder
    image, expected_image = given.get("image"), expected["image"]
    if isinstance(image, dict) and expected_image is not None:
        expected["image"] = image | expected_image
    return [key for key, value in given.items() if value != expected[key]]


def _check_image_size(pretrained: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        ConfigError: images are to be of another size than those of a complete encoder.
    """
    wanted, own = pretrained.get("image_size"), pretrained["definition"].get("image_size")
    if wanted is not None and wanted != own:
        raise ConfigError(
            f"image_size = {wanted}, and {folder}, from which its positions follow, is not there"
        )


def positions_before_text(definition: dict[str, Any]) -> int:
    """Number of the first text position."""
    if definition["model_type"] in _POSITIONS_AFTER_PADDING:
        return int(definition["pad_token_id"]) + 1
    return 0


def image_size_of(folder: Path) -> int:
    """Pixels per side of the images that a folder's model was trained with.

    Raises:
        ConfigError: it is no model of square images that transformers knows.
    """
    return _side(_read_definition(folder), "image_size")


def _resize(definition: dict[str, Any], side: Any) -> None:
    """Have a model read images of so many pixels a side."""
    if "image_size" not in definition or reads_audio(definition):
        raise ConfigError("image_size is given, but the model reads no images: leave it out")
    if any(definition.get(key) for key in _BIASES_BY_WINDOW):
        raise ConfigError(
            f"image_size = {side}: a model of type {definition['model_type']!r} has biases of relative "
            "positions, which are of one size of images: leave it out"
        )
    definition["image_size"] = side


def _read_definition(folder: Path) -> dict[str, Any]:
    """The model's config with every default, of the vision model where there are several."""
    if not path_exists(folder / "config.json"):
        raise ConfigError(f"{folder} has no config.json: expected a folder that save_pretrained wrote")
    read_foreign_config(folder)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of values that are not what a model's class expects: anything
        raise ConfigError(f"{folder} is no model that transformers knows: {error}") from None
    vision = getattr(config, "vision_config", None)
    definition = (vision or config).to_dict()
    # Nothing random: dropout would differ from topology to topology.
    for key, value in definition.items():
        if ("drop" in key or key.startswith("mask_")) and isinstance(value, float):
            definition[key] = 0.0
    # Parts that serve other heads than the vectors.
    if "vision_use_head" in definition:
        definition["vision_use_head"] = False
    kept = json.loads(json.dumps(definition))
    for key in ("_name_or_path", "torch_dtype", "dtype", "transformers_version", "architectures"):
        kept.pop(key, None)
    return kept


def _sizes(definition: dict[str, Any]) -> dict[str, Any]:
    try:
        sizes = {
            "num_layers": definition["num_hidden_layers"],
            "hidden_size": definition["hidden_size"],
            "num_heads": definition["num_attention_heads"],
            "ffn_hidden_size": definition["intermediate_size"],
            "max_text_positions": 0,
            "image": None,
            "audio": None,
        }
        if "patch_size" in definition and not reads_audio(definition):
            return {**sizes, "image": {key: _side(definition, key) for key in ("image_size", "patch_size")}}
        if reads_audio(definition):
            return sizes
        longest = definition["max_position_embeddings"] - positions_before_text(definition)
        return {**sizes, "max_text_positions": longest}
    except KeyError as error:
        raise ConfigError(
            f"a model of type {definition.get('model_type')!r} has no {error.args[0]}: expected an encoder "
            "of text, images or audio"
        ) from None


def _side(definition: dict[str, Any], key: str) -> int:
    value = definition[key]
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1:
        raise ConfigError(f"{key} is {value}: expected squares")
    return int(sides.pop())


def _pixels(folder: Path) -> dict[str, Any]:
    """Mean and deviation of the pixels in 0..1, as the folder's image processor has them."""
    path = folder / "preprocessor_config.json"
    processor = read_json_object(path, "the model's image processor")
    try:
        if not processor.get("do_normalize", True):
            return {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        if abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
            raise ConfigError(f"{path}: rescale_factor is not 1/255")
        return {key: [float(part) for part in processor[key]] for key in ("image_mean", "image_std")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error!r}") from None
