"""Whether a run can begin, or go on from a checkpoint: what a dry run checks as the start does.

Nothing here reads weights, or needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.manifest import LATEST_NAME, read_manifest, read_regular_file
from metalm.checkpoint.names import CHECKPOINTS_NAME, CONFIG_NAME, list_checkpoints
from metalm.checkpoint.state import STATE_NAME, RunState, first_mistake, parse_state
from metalm.config import ModelConfig, RunConfig
from metalm.data.corpus import Corpus
from metalm.errors import CheckpointError, ConfigError

_FREE_TO_CHANGE = (
    *("dropout", "recompute", "trained_layers", "trained_connector", "pretrained.path"),
    "decoder.start",
)
"""Ends of keys of the model's section that may differ from start to start: the weights keep their meaning."""


def check_going_on(corpus: Corpus) -> None:
    """Check what the start of a run will find of checkpoints. Their contents are not hashed.

    Raises:
        ConfigError: a checkpoint is of another model or tokenizer, or leaves no steps to train.
        CheckpointError: there is none where one is required, or it cannot be read.
    """
    config = corpus.config
    run_folder = config.run.folder / config.run.name
    is_own = bool(list_checkpoints(run_folder / CHECKPOINTS_NAME))
    if not is_own:
        require_to_begin(run_folder / CHECKPOINTS_NAME, config)
    source = run_folder if is_own else config.initialize.run
    if source is None:
        return
    folder = find_checkpoint(source)
    state = parse_state(read_regular_file(folder / STATE_NAME), str(folder / STATE_NAME))
    refuse_another_model(corpus, folder, read_manifest(folder), state)
    if not is_own:
        require_steps(config, folder, state)


def require_to_begin(checkpoints: Path, config: RunConfig) -> None:
    """Refuse to begin a run in whose folder there is no checkpoint, where one was to be.

    Raises:
        CheckpointError: there is a file `latest`, or `checkpoint.resume` is `required`.
    """
    latest = checkpoints / LATEST_NAME
    if latest.exists():
        raise CheckpointError(f"{latest} is there, but no checkpoint is; remove it to start from scratch")
    if config.checkpoint.resume == "required":
        raise CheckpointError(f"there is no checkpoint in {checkpoints}, and checkpoint.resume is `required`")


def require_steps(config: RunConfig, folder: Path, state: RunState) -> None:
    """Refuse to begin a run that goes on from another's checkpoint and would end at once.

    Raises:
        ConfigError: naming both numbers.
    """
    if state.step >= config.training.steps:
        raise ConfigError(
            f"training.steps = {config.training.steps} leaves nothing to train: initialize.run goes on from "
            f"step {state.step} of {folder}, which counts; give a larger number"
        )


def refuse_another_model(corpus: Corpus, folder: Path, files: Collection[str], state: RunState) -> None:
    """Refuse to go on from a checkpoint whose weights mean something else under this config.

    Args:
        folder: of the checkpoint.
        files: that its manifest lists.
        state: that it holds.

    Raises:
        ConfigError: naming every key that differs.
        CheckpointError: the checkpoint's config cannot be read.
    """
    advice = (
        "\ngive the run's own values; or start a new run from its weights: another run.name, with "
        f"initialize.decoder and initialize.encoders={folder}"
    )
    if CONFIG_NAME in files:
        changes = list(
            _changes("model", _model_of(folder / CONFIG_NAME), corpus.config.model.model_dump(mode="json"))
        )
        if changes:
            lines = [f"  {key}: {old} in the checkpoint, {new} in the config" for key, old, new in changes]
            raise ConfigError(
                "\n".join([f"{folder} is of another model than the config's:", *lines]) + advice
            )
    tokenizer = corpus.tokenizer
    if state.tokenizer not in (None, tokenizer.fingerprint):
        raise ConfigError(
            f"data.tokenizer: {corpus.config.data.tokenizer} ({tokenizer.fingerprint[:16]}) is not the "
            f"tokenizer that {folder} was trained with ({state.tokenizer[:16]}): "
            "ids mean other tokens" + advice
        )


def _model_of(path: Path) -> dict[str, Any]:
    """The model's section of the config that a checkpoint was written with; later keys have their default."""
    try:
        section = yaml.safe_load(path.read_text())["model"]
        return ModelConfig.model_validate(section).model_dump(mode="json")
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is of another version of this program: model.{first_mistake(error)}"
        ) from None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _changes(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ, with both values.

    What transformers says of a pretrained model has other keys in other versions: those of both count.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        is_foreign = key.endswith((".pretrained.definition", ".pretrained.processor"))
        for name in old.keys() & new.keys() if is_foreign else dict.fromkeys([*old, *new]):
            yield from _changes(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new and not key.endswith(tuple(f".{name}" for name in _FREE_TO_CHANGE)):
        yield key, _shown(old), _shown(new)


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    return "present" if isinstance(value, dict) else repr(value)
