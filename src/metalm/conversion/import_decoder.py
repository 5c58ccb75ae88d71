"""A pretrained language model as the decoder: a checkpoint of weights alone, from which runs start.

Beside the checkpoint lie the model's tokenizer and a file that a pipeline extends, with the model section
that fits. Weights are streamed; memory is needed for one parameter.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from metalm.checkpoint.folders import step_folder
from metalm.checkpoint.format import ParameterIndex, Piece, piece_name, rank_file, write_index
from metalm.checkpoint.manifest import PARTIAL_SUFFIX, publish, record_file, write_manifest
from metalm.checkpoint.reader import STATE_NAME
from metalm.config import ModelConfig
from metalm.conversion.foreign_decoders import ForeignDecoder, read_foreign_decoder
from metalm.conversion.foreign_tokenizer import complete_tokenizer, extend_embedding
from metalm.conversion.mapping import Rule, conversion_rules
from metalm.conversion.restore import FolderWeights
from metalm.conversion.shards import write_safetensors
from metalm.data.tokenizer import Tokenizer
from metalm.errors import CheckpointError, ConfigError

TOKENIZER_FOLDER = "tokenizer"
PIPELINE_NAME = "decoder.yaml"
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_STATES = ("master",)
_CHOICES = {"recompute", "spans"}
"""Of the decoder's section: what the run decides, not the weights."""


@dataclass(frozen=True)
class ImportedDecoder:
    """What an import wrote."""

    folder: Path
    num_parameters: int
    pipeline: Path
    """For a pipeline to extend."""
    longest: int
    """Positions that the model was made for; a run's rows should not be longer."""


def import_decoder(folder: Path, out: Path) -> ImportedDecoder:
    """Import a folder of GPT-2, Llama, Mistral or Qwen2.

    Args:
        folder: as transformers saves models: config.json, safetensors, tokenizer.json.
        out: must not exist.

    Raises:
        ConfigError: `out` exists, or the model is not one that the decoder can be.
        CheckpointError: weights are missing or damaged, or a write failed. No folder is left.
        DataError: the tokenizer is missing or unsafe.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give another folder, or remove it first")
    weights = FolderWeights(folder)
    foreign = read_foreign_decoder(folder, weights.names)
    partial = out.with_name(out.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tokenizer = complete_tokenizer(folder, partial / TOKENIZER_FOLDER)
        vocab_size = max(foreign.vocab_size, tokenizer.size)
        model = ModelConfig(vocab_size=vocab_size, decoder=foreign.decoder)
        rules = conversion_rules(model)
        _check(weights, foreign, rules)
        _write_checkpoint(partial, rules, _masters(rules, weights, foreign, tokenizer, vocab_size), folder)
        (partial / PIPELINE_NAME).write_text(_pipeline(model, foreign, folder, out))
        partial.replace(out)
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count = sum(math.prod(shape) for rule in rules for shape in rule.targets.values())
    return ImportedDecoder(out, count, out / PIPELINE_NAME, foreign.longest)


def _check(weights: FolderWeights, foreign: ForeignDecoder, rules: list[Rule]) -> None:
    """Every weight that is needed is there, and none is left over."""
    needed = {foreign.find(target)[0] for rule in rules for target in rule.targets}
    left = sorted(name for name in weights.names - needed if not foreign.is_unused(name))
    problems = [f"lacks {name}" for name in sorted(needed - weights.names)]
    problems += [f"holds {name}, for which the decoder has no place" for name in left]
    if problems:
        lines = [f"  {problem}" for problem in problems[:10]]
        raise CheckpointError("\n".join(["the weights are not those of the config:", *lines]))


def _masters(
    rules: list[Rule],
    weights: FolderWeights,
    foreign: ForeignDecoder,
    tokenizer: Tokenizer,
    vocab_size: int,
) -> Iterator[tuple[str, Tensor]]:
    """The decoder's parameters, flat, by the name of their piece."""

    def read(target: str, shape: tuple[int, ...]) -> Tensor:
        name, change = foreign.find(target)
        tensor = change(weights.read(name))
        if target in _VOCABULARY and tensor.dim() == 2:
            tensor = extend_embedding(tensor, tokenizer, vocab_size, foreign.start_id, foreign.end_id)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name} gives {list(tensor.shape)}, the config asks for {list(shape)}")
        return tensor

    for rule in rules:
        whole = rule.join([read(target, shape) for target, shape in rule.targets.items()])
        yield piece_name(rule.name, _STATES[0]), whole.flatten()


def _write_checkpoint(
    out: Path, rules: list[Rule], masters: Iterator[tuple[str, Tensor]], origin: Path
) -> None:
    folder = step_folder(out / "checkpoints", 0)
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    (partial / "decoder").mkdir(parents=True)
    file = rank_file(0)
    sizes = {piece_name(rule.name, _STATES[0]): (math.prod(rule.shape),) for rule in rules}
    write_safetensors(partial / "decoder" / file, masters, sizes, torch.float32)
    index = {}
    for rule in rules:
        piece = Piece(file, 0, 0, math.prod(rule.shape))
        index[rule.name] = ParameterIndex(rule.shape, None, 1, 1, (piece,), _STATES)
    write_index(partial / "decoder", index)
    state = {
        "step": 0,
        "imported_from": str(origin),
        "topology": {"tensor": 1, "data": 1},
        "zero_stages": {"decoder": 0},
        "optimizer_steps": {"decoder": 0},
    }
    (partial / STATE_NAME).write_text(json.dumps(state, indent=1))
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    write_manifest(partial, {str(path.relative_to(partial)): record_file(path) for path in files})
    publish(partial)


def _pipeline(model: ModelConfig, foreign: ForeignDecoder, origin: Path, out: Path) -> str:
    section = {
        "model": {
            "vocab_size": model.vocab_size,
            "vocab_multiple": model.vocab_multiple,
            "decoder": model.decoder.model_dump(mode="json", exclude=_CHOICES),
        },
        "data": {"tokenizer": str(out / TOKENIZER_FOLDER)},
        "initialize": {"decoder": str(out)},
    }
    heading = (
        f"# The decoder of {origin}. A pipeline takes it with `extends`; what it extends later wins.\n"
        f"# The model was made for {foreign.longest} positions: data.sequence_length should not be above.\n"
    )
    return heading + yaml.safe_dump(section, sort_keys=False)
