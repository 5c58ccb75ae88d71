"""A checkpoint as conversion sees it: its config, its tokenizer and parameters that fit the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.names import CONFIG_NAME
from metalm.checkpoint.reader import AverageReader, CheckpointReader
from metalm.config import RunConfig
from metalm.config.load import load_resolved_config
from metalm.conversion.adapters import Adapters, without_adapters
from metalm.conversion.hf_config import SHIPPED_MODALITIES
from metalm.conversion.mapping import Rule, conversion_rules
from metalm.data.tokenizer import Tokenizer, load_tokenizer
from metalm.errors import CheckpointError, ConfigError, DataError
from metalm.modalities import modality_of_encoder
from metalm.model.adapters import is_adapter

MAPPED_BYTES = 2**28
"""Contents that may stay mapped before the files are opened anew."""


@dataclass
class CheckpointSource:
    """One step of a run, checked against its own model config."""

    folder: Path
    config: RunConfig
    """Of the run, but its model without adapters."""
    provenance: dict[str, Any]
    """Versions and commit that the run was started with."""
    reader: CheckpointReader
    tokenizer: Tokenizer
    rules: list[Rule]
    adapters: Adapters
    merges_adapters: bool
    _mapped_bytes: int = 0

    def read(self, component: str, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A whole parameter, float32, with the precision of `dtype`; with its adapter, if they are merged."""
        whole = self.reader.read(component, name)
        if self.merges_adapters:
            whole = self.adapters.merged(component, name, whole)
        self._mapped_bytes += whole.nbytes
        if self._mapped_bytes > MAPPED_BYTES:
            self.reader.close()  # pages of its files count as this process's memory
            self._mapped_bytes = 0
        return whole.to(dtype).to(torch.float32)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face folder's tensors, in the order of the rules."""
        for rule in self.rules:
            yield from zip(rule.targets, rule.split(self.read(rule.component, rule.name)), strict=True)


def open_checkpoint(
    path: Path, tokenizer_path: Path | None = None, *, merges_adapters: bool = True, average: bool = False
) -> CheckpointSource:
    """Open a run's newest checkpoint, or the one that `path` is, and hash all of it.

    Args:
        path: a run folder or a step folder.
        tokenizer_path: where the tokenizer is now, if not where the run's config says.
        merges_adapters: read weights with their adapters in them.
        average: read the moving average of the weights; a checkpoint without one is a CheckpointError.

    Raises:
        CheckpointError: damaged, partial, or not of the model that its config describes.
        ConfigError: the model is not one to export.
        DataError: there is no tokenizer, or it is not the run's.
    """
    folder = find_checkpoint(path)
    reader = (AverageReader if average else CheckpointReader)(folder, verify=True)
    config_path = reader.path_of(CONFIG_NAME)
    config = load_resolved_config(config_path)
    content = yaml.safe_load(config_path.read_text())
    for name, encoder in config.model.encoders.items():
        modality = modality_of_encoder(encoder).name
        if modality not in SHIPPED_MODALITIES:
            raise ConfigError(
                f"{folder}: encoder {name} reads {modality}, which the code of exported folders does not: "
                f"it knows {', '.join(SHIPPED_MODALITIES)}"
            )
        if encoder.connector == "detection":
            raise ConfigError(
                f"{folder} is of replaced-token detection: its encoder is for another run to start from, "
                "by initialize.encoders, and no model to export"
            )
    adapters = Adapters(config.model, reader)
    config = config.model_copy(update={"model": without_adapters(config.model)})
    rules = conversion_rules(config.model)
    _check_parameters(reader, rules)
    adapters.check(rules)
    tokenizer = load_tokenizer(tokenizer_path or config.data.tokenizer)
    _check_tokenizer(tokenizer, reader, config, tokenizer_path or config.data.tokenizer)
    return CheckpointSource(
        folder=folder,
        config=config,
        provenance=content.get("provenance", {}),
        reader=reader,
        tokenizer=tokenizer,
        rules=rules,
        adapters=adapters,
        merges_adapters=merges_adapters,
    )


def _check_parameters(reader: CheckpointReader, rules: list[Rule]) -> None:
    found = {
        (component, name): shape
        for component in reader.components()
        for name, shape in reader.parameters(component).items()
        if not is_adapter(name)
    }
    wanted = {(rule.component, rule.name): rule.shape for rule in rules}
    problems = [f"lacks {'.'.join(key)}" for key in wanted.keys() - found.keys()]
    problems += [f"holds {'.'.join(key)}, which the model has not" for key in found.keys() - wanted.keys()]
    problems += [
        f"holds {'.'.join(key)} of {list(found[key])}, the model needs {list(wanted[key])}"
        for key in wanted.keys() & found.keys()
        if wanted[key] != found[key]
    ]
    if problems:
        lines = [f"  {problem}" for problem in sorted(problems)[:10]]
        raise CheckpointError("\n".join([f"checkpoint {reader.folder} does not fit its config:", *lines]))


def _check_tokenizer(tokenizer: Tokenizer, reader: CheckpointReader, config: RunConfig, path: Path) -> None:
    if tokenizer.size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer {path} has {tokenizer.size} ids, the model {config.model.vocab_size}: "
            "give the run's own with --tokenizer"
        )
    trained_with = reader.state.tokenizer
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise DataError(
            f"the run was trained with the tokenizer {trained_with[:16]}, but {path} is "
            f"{tokenizer.fingerprint[:16]}: give the run's own with --tokenizer"
        )
