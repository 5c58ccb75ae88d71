"""A Hugging Face folder back to a checkpoint that trains, on any layout.

The checkpoint is step 0 of a new run: weights from the folder (exported, finetuned, or with LoRA merged),
optimizer moments zero, data from the beginning. Padded vocabulary rows, which the folder has not, are 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metalm.checkpoint.format import STATES, piece_name
from metalm.checkpoint.names import CHECKPOINTS_NAME, step_folder
from metalm.checkpoint.publishing import checkpoint_of_weights
from metalm.checkpoint.reader import read_json
from metalm.checkpoint.state import RunFacts
from metalm.config import RunConfig, config_content
from metalm.config.foreign_folder import read_weight_map
from metalm.conversion.hf_config import model_config
from metalm.conversion.mapping import Rule, Shape, conversion_rules
from metalm.conversion.shipped.configuration_metalm import ENCODER_DEFAULTS
from metalm.conversion.tokenizer_files import TOKENIZER_NAME, is_same_tokenizer
from metalm.conversion.weight_files import INDEX_NAME, WEIGHTS_NAME
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.errors import CheckpointError, ConfigError, DataError
from metalm.outputs import require_folder_place, writing
from metalm.regular_files import open_regular
from metalm.run_lock import RunLock

_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "activation",
    "normalization",
    "parallel_residual",
    "norm",
    "norm_eps",
    "biases",
    "qkv_biases",
    "positions",
    "rope_parameters",
    "scale_embedding",
    "scale_docked_vectors",
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
        ConfigError: the run has checkpoints already, is being trained or cannot be written, or its model is
            another one. No checkpoint is left.
        CheckpointError: the folder lacks weights. No checkpoint is left.
        DataError: the run's tokenizer is not the folder's.
    """
    run_folder = config.run.folder / config.run.name
    checkpoints = run_folder / CHECKPOINTS_NAME
    if checkpoints.exists():
        raise ConfigError(f"the run {run_folder} has checkpoints already; choose another run.name")
    if any(part.adapter for part in (config.model.decoder, *config.model.encoders.values())):
        raise ConfigError(
            "the run's model has an adapter, which the folder has not: restore into a run without one, and "
            "start the run with the adapter from that by initialize.decoder and initialize.encoders"
        )
    advice = "choose another run.folder"
    require_folder_place(run_folder, advice)
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_model(folder, config, tokenizer)
    weights = FolderWeights(folder)
    rules = conversion_rules(config.model)
    weights.check({name: shape for rule in rules for name, shape in rule.targets.items()})
    components = tuple(dict.fromkeys(rule.component for rule in rules))
    facts = RunFacts(tokenizer=tokenizer.fingerprint, origin=str(folder))
    content = config_content(config, {"converted_from": str(folder)})
    checkpoint = step_folder(checkpoints, 0)
    lock = RunLock(run_folder)
    try:
        with (
            writing(checkpoint, advice),
            checkpoint_of_weights(checkpoints, components, facts, content) as writer,
        ):
            for component in components:
                own = [rule for rule in rules if rule.component == component]
                shapes = {rule.name: rule.shape for rule in own}
                writer.write(component, shapes, STATES, _pieces(own, weights))
    finally:
        with suppress(OSError):  # the checkpoint is in it
            checkpoints.rmdir()
        lock.release()
    return checkpoint


class FolderWeights:
    """The weights of a Hugging Face folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Find out which file holds what.

        Raises:
            CheckpointError, ConfigError: there are no weights, or their index is damaged.
        """
        self._folder = folder
        self._open: dict[str, Any] = {}
        if (folder / INDEX_NAME).is_file():
            self._files = read_weight_map(folder / INDEX_NAME)
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
            try:
                found = tuple(self._file(self._files[name]).get_slice(name).get_shape())
            except SafetensorError:
                problems.append(f"says that {name} is in {self._files[name]}, where it is not")
                continue
            if found != shapes[name]:
                problems.append(f"holds {name} of {list(found)}, the model needs {list(shapes[name])}")
        if problems:
            lines = [f"  {problem}" for problem in sorted(problems)[:10]]
            raise CheckpointError("\n".join([f"{self._folder} does not fit the run's model:", *lines]))

    def read(self, name: str) -> Tensor:
        """A tensor, float32.

        Raises:
            CheckpointError: the file that should hold it cannot be read, or holds no such tensor.
        """
        try:
            return self._file(self._files[name]).get_tensor(name).to(torch.float32)
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder / self._files[name]} has no {name}: {error}") from None

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            try:
                open_regular(path).close()  # safetensors would wait for a pipe
                self._open[name] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self._folder / name} cannot be read: {error}") from None
        return self._open[name]


def _check_model(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    found = read_json(folder / "config.json")
    wanted = model_config(config, tokenizer, torch.float32)
    for content in (found, wanted):  # transformers saves every key, other versions of ours have fewer
        encoders = content.get("encoders") or {}
        if isinstance(encoders, dict) and all(isinstance(sizes, dict) for sizes in encoders.values()):
            content["encoders"] = {name: ENCODER_DEFAULTS | sizes for name, sizes in encoders.items()}
    found = {"scale_docked_vectors": False, "parallel_residual": False} | found
    heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        found.setdefault("head_dim", hidden // heads)
    if different := [key for key in _ARCHITECTURE if found.get(key) != wanted[key]]:
        lines = [f"  {key}: {found.get(key)} in the folder, {wanted[key]} in the run" for key in different]
        raise ConfigError("\n".join([f"{folder} is another model than the run's:", *lines]))
    if not is_same_tokenizer(folder / TOKENIZER_NAME, tokenizer):
        raise DataError(
            f"the run's tokenizer {config.data.tokenizer} is not that of {folder}: its ids mean other tokens"
        )


def _pieces(rules: list[Rule], weights: FolderWeights) -> Iterator[tuple[str, Tensor]]:
    for rule in rules:
        whole = rule.join([weights.read(name) for name in rule.targets]).flatten()
        for state in STATES:
            yield piece_name(rule.name, state), whole if state == "master" else torch.zeros_like(whole)
