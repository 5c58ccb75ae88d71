"""A pretrained language model as the decoder: a checkpoint of weights alone, from which runs start.

Beside the checkpoint lie the model's tokenizer and a file that a pipeline extends, with the model section
that fits. Weights are streamed; memory is needed for one parameter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from metalm.checkpoint.format import piece_name
from metalm.checkpoint.manifest import remove
from metalm.checkpoint.names import CHECKPOINTS_NAME, PARTIAL_SUFFIX
from metalm.checkpoint.publishing import checkpoint_of_weights
from metalm.checkpoint.state import RunFacts
from metalm.config import ModelConfig
from metalm.conversion.completed_tokenizer import complete_tokenizer, read_foreign_tokenizer
from metalm.conversion.families.family import ForeignDecoder
from metalm.conversion.foreign_decoders import read_foreign_decoder
from metalm.conversion.foreign_tokenizer import extend_embedding
from metalm.conversion.mapping import Rule, conversion_rules
from metalm.conversion.restore import FolderWeights
from metalm.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from metalm.errors import CheckpointError, ConfigError
from metalm.outputs import require_folder_place, writing

TOKENIZER_FOLDER = "tokenizer"
PIPELINE_NAME = "decoder.yaml"
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_STATES = ("master",)
_CHOICES = {"recompute", "spans", "trained_layers", "adapter"}
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
    """Import a folder of one of `foreign_decoders.FAMILIES`.

    Args:
        folder: as transformers saves models: config.json, safetensors, tokenizer.json.
        out: must not exist.

    Raises:
        ConfigError: `out` exists or cannot be written, or the model is not one that the decoder can be. No
            folder is left.
        CheckpointError: the folder or weights are missing or damaged. No folder is left.
        DataError: the tokenizer is missing or unsafe.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; give another folder, or remove it first")
    advice = "name another folder"
    require_folder_place(out, advice)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder}: download a model of the Hugging Face Hub first, such as by "
            f"`hf download OWNER/{folder.name} --local-dir {folder}`"
        )
    weights = FolderWeights(folder)
    foreign = read_foreign_decoder(folder, weights.names)
    partial = out.with_name(f"{out.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    if os.path.lexists(partial):
        raise ConfigError(f"{partial} is in the way: move it")
    try:
        with writing(out, advice):
            partial.mkdir(parents=True)
            tokenizer = complete_tokenizer(folder, partial / TOKENIZER_FOLDER)
            vocab_size = max(foreign.vocab_size, tokenizer.size)
            model = ModelConfig(vocab_size=vocab_size, decoder=foreign.decoder)
            rules = conversion_rules(model)
            _check(weights, foreign, rules)
            known = read_foreign_tokenizer(folder).get_vocab().keys()
            new_ids = {
                id_
                for token, id_ in zip(SPECIAL_TOKENS, tokenizer.special_ids, strict=True)
                if token not in known
            }
            masters = _masters(rules, weights, foreign, tokenizer, new_ids, vocab_size)
            facts = RunFacts(tokenizer=tokenizer.fingerprint, origin=str(folder))
            with checkpoint_of_weights(partial / CHECKPOINTS_NAME, ("decoder",), facts, None) as writer:
                writer.write("decoder", {rule.name: rule.shape for rule in rules}, _STATES, masters)
            (partial / PIPELINE_NAME).write_text(_pipeline(model, foreign, folder, out))
            partial.replace(out)
    finally:
        remove(partial)
    count = sum(math.prod(shape) for rule in rules for shape in rule.targets.values())
    return ImportedDecoder(out, count, out / PIPELINE_NAME, foreign.longest)


def _check(weights: FolderWeights, foreign: ForeignDecoder, rules: list[Rule]) -> None:
    """Every weight that is needed is there, and none is left over."""
    targets = [target for rule in rules for target in rule.targets if foreign.value_of(target) is None]
    needed = {foreign.find(target)[0] for target in targets}
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
    new_ids: Set[int],
    vocab_size: int,
) -> Iterator[tuple[str, Tensor]]:
    """The decoder's parameters, flat, by the name of their piece."""

    def read(target: str, shape: tuple[int, ...]) -> Tensor:
        if (value := foreign.value_of(target)) is not None:
            return torch.full(shape, value)
        name, change = foreign.find(target)
        tensor = change(weights.read(name))
        if target in _VOCABULARY and tensor.dim() == 2:
            ends = foreign.start_id, foreign.end_id
            tensor = extend_embedding(tensor, tokenizer, new_ids, vocab_size, *ends)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name} gives {list(tensor.shape)}, the config asks for {list(shape)}")
        return tensor

    for rule in rules:
        whole = rule.join([read(target, shape) for target, shape in rule.targets.items()])
        yield piece_name(rule.name, _STATES[0]), whole.flatten()


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
