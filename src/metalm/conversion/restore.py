"""A Hugging Face folder back to a checkpoint that trains, on any layout.

The checkpoint is step 0 of a new run: weights from the folder (exported, finetuned, or with LoRA merged),
optimizer moments zero, data from the beginning. Padded vocabulary rows, which the folder has not, are 0.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metalm.checkpoint.folders import step_folder
from metalm.checkpoint.format import STATES, ParameterIndex, Piece, piece_name, rank_file, write_index
from metalm.checkpoint.manifest import PARTIAL_SUFFIX, publish, record_file, write_manifest
from metalm.checkpoint.reader import CONFIG_NAME, STATE_NAME, read_json
from metalm.config import RunConfig, write_config
from metalm.conversion.hf_config import model_config
from metalm.conversion.mapping import Rule, Shape, conversion_rules
from metalm.conversion.shards import INDEX_NAME, WEIGHTS_NAME, write_safetensors
from metalm.conversion.shipped.configuration_metalm import ENCODER_DEFAULTS
from metalm.conversion.tokenizer_files import TOKENIZER_NAME, is_same_tokenizer
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.errors import CheckpointError, ConfigError, DataError

_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "activation",
    "normalization",
    "norm",
    "norm_eps",
    "biases",
    "qkv_biases",
    "positions",
    "rope_parameters",
    "scale_embedding",
    "spans",
    "tie_word_embeddings",
    "encoders",
)


def restore_checkpoint(folder: Path, config: RunConfig) -> Path:
    """Write an exported folder as the first checkpoint of a run.

    Args:
        folder: written by `convert_to_hf`, or saved by transformers after it was loaded from there.
        config: of the run that is to go on from it; its model must be the folder's.

    Returns:
        The checkpoint.

    Raises:
        ConfigError: the run has checkpoints already, or its model is another one.
        CheckpointError: the folder lacks weights, or a write failed. No checkpoint is left.
        DataError: the run's tokenizer is not the folder's.
    """
    run_folder = config.run.folder / config.run.name
    checkpoint = step_folder(run_folder / "checkpoints", 0)
    if checkpoint.parent.exists():
        raise ConfigError(f"the run {run_folder} has checkpoints already; choose another run.name")
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_model(folder, config, tokenizer)
    weights = FolderWeights(folder)
    rules = conversion_rules(config.model)
    weights.check({name: shape for rule in rules for name, shape in rule.targets.items()})
    partial = checkpoint.with_name(checkpoint.name + PARTIAL_SUFFIX)
    partial.mkdir(parents=True)
    try:
        _write(partial, rules, weights, config, folder)
        return publish(partial)
    except BaseException as error:
        shutil.rmtree(checkpoint.parent)
        if isinstance(error, OSError):
            raise CheckpointError(f"{checkpoint} could not be written: {error}") from error
        raise


class FolderWeights:
    """The weights of a Hugging Face folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Find out which file holds what.

        Raises:
            CheckpointError: there are no weights, or their index is damaged.
        """
        self._folder = folder
        self._open: dict[str, Any] = {}
        if (folder / INDEX_NAME).is_file():
            self._files = _weight_map(folder / INDEX_NAME)
        elif (folder / WEIGHTS_NAME).is_file():
            self._files = dict.fromkeys(self._file(WEIGHTS_NAME).keys(), WEIGHTS_NAME)
        else:
            raise CheckpointError(f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}")

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Compare names and shapes with those that are needed.

        Raises:
            CheckpointError: naming the first that differ.
        """
        problems = [f"lacks {name}" for name in shapes.keys() - self._files.keys()]
        problems += [f"holds {name}, which the model has not" for name in self._files.keys() - shapes.keys()]
        for name in shapes.keys() & self._files.keys():
            found = tuple(self._file(self._files[name]).get_slice(name).get_shape())
            if found != shapes[name]:
                problems.append(f"holds {name} of {list(found)}, the model needs {list(shapes[name])}")
        if problems:
            lines = [f"  {problem}" for problem in sorted(problems)[:10]]
            raise CheckpointError("\n".join([f"{self._folder} does not fit the run's model:", *lines]))

    def read(self, name: str) -> Tensor:
        """A tensor, float32."""
        return self._file(self._files[name]).get_tensor(name).to(torch.float32)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self._folder / name, "pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._folder / name} cannot be read: {error}") from None
        return self._open[name]


def _weight_map(path: Path) -> dict[str, str]:
    try:
        return {str(name): Path(file).name for name, file in read_json(path)["weight_map"].items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not an index of weights") from None


def _check_model(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    found, wanted = read_json(folder / "config.json"), model_config(config, tokenizer, torch.float32)
    for content in (found, wanted):  # transformers saves every key, other versions of ours have fewer
        encoders = content.get("encoders") or {}
        content["encoders"] = {name: ENCODER_DEFAULTS | sizes for name, sizes in encoders.items()}
    if different := [key for key in _ARCHITECTURE if found.get(key) != wanted[key]]:
        lines = [f"  {key}: {found.get(key)} in the folder, {wanted[key]} in the run" for key in different]
        raise ConfigError("\n".join([f"{folder} is another model than the run's:", *lines]))
    if not is_same_tokenizer(folder / TOKENIZER_NAME, tokenizer):
        raise DataError(
            f"the run's tokenizer {config.data.tokenizer} is not that of {folder}: its ids mean other tokens"
        )


def _write(partial: Path, rules: list[Rule], weights: FolderWeights, config: RunConfig, origin: Path) -> None:
    components = list(dict.fromkeys(rule.component for rule in rules))
    for component in components:
        own = [rule for rule in rules if rule.component == component]
        (partial / component).mkdir()
        sizes = {piece_name(rule.name, state): (math.prod(rule.shape),) for rule in own for state in STATES}
        file = rank_file(0)
        write_safetensors(partial / component / file, _pieces(own, weights), sizes, torch.float32)
        index = {
            rule.name: ParameterIndex(rule.shape, None, 1, 1, (Piece(file, 0, 0, math.prod(rule.shape)),))
            for rule in own
        }
        write_index(partial / component, index)
    (partial / "data").mkdir()
    state = {
        "step": 0,
        "progress": {"trained_tokens": 0.0},
        "topology": {"tensor": 1, "data": 1},
        "zero_stages": dict.fromkeys(components, 0),
        "optimizer_steps": dict.fromkeys(components, 0),
        "engine_counters": {name: {"global_steps": 0, "skipped_steps": 0} for name in components},
    }
    (partial / STATE_NAME).write_text(json.dumps(state, indent=1))
    write_config(config, partial / CONFIG_NAME, {"converted_from": str(origin)})
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    write_manifest(partial, {str(path.relative_to(partial)): record_file(path) for path in files})


def _pieces(rules: list[Rule], weights: FolderWeights) -> Iterator[tuple[str, Tensor]]:
    for rule in rules:
        whole = rule.join([weights.read(name) for name in rule.targets]).flatten()
        for state in STATES:
            yield piece_name(rule.name, state), whole if state == "master" else torch.zeros_like(whole)
