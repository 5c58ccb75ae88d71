"""Whether a run can begin, or go on from a checkpoint: what a dry run checks as the start does.

Nothing here reads weights, or needs torch.
"""

from __future__ import annotations

import fnmatch
import logging
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
from metalm.config.secrets import without_secrets
from metalm.data.corpus import Corpus
from metalm.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_FREE_TO_CHANGE = (
    *("dropout", "recompute", "trained_layers", "trained_connector", "pretrained.path"),
    "decoder.start",
)
"""Ends of keys of the model's section that may differ from start to start: the weights keep their meaning."""


_TOLD_ELSEWHERE = {"model", "run", "initialize", "monitor"}
"""Sections that are compared apart, or change no weight."""


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
        for component, path in initial_weights(config).items():
            folder = find_checkpoint(path)
            state = parse_state(read_regular_file(folder / STATE_NAME), str(folder / STATE_NAME))
            check_initial_weights(corpus, component, folder, read_manifest(folder), state)
        return
    folder = find_checkpoint(source)
    state = parse_state(read_regular_file(folder / STATE_NAME), str(folder / STATE_NAME))
    refuse_another_model(corpus, folder, read_manifest(folder), state)
    if not is_own:
        require_steps(config, folder, state)


def initial_weights(config: RunConfig) -> dict[str, Path]:
    """By component, where a new run takes its weights from."""
    paths = {"decoder": config.initialize.decoder, "encoders": config.initialize.encoders}
    return {component: path for component, path in paths.items() if path is not None}


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
    if CONFIG_NAME in files and (changes := list(_other_settings(folder / CONFIG_NAME, corpus.config))):
        lines = [f"  {key}: {old} until then, {new} now" for key, old, new in changes]
        logger.info("\n".join([f"going on from {folder} with other settings:", *lines]))


def check_initial_weights(
    corpus: Corpus, component: str, folder: Path, files: Collection[str], state: RunState
) -> None:
    """Check weights to begin with; where they were trained with another tokenizer or other keys, warn.

    That may be intended, as with a longer context to come. Where shapes differ, the start refuses them.

    Args:
        component: `decoder` or `encoders`.
        folder: of the checkpoint.
        files: that its manifest lists.
        state: that it holds.

    Raises:
        CheckpointError: the model, or the checkpoint, has no such component.
    """
    if component == "encoders" and not corpus.config.model.encoders:
        raise CheckpointError(f"the model has no encoders to start from {folder}")
    if component not in state.zero_stages:
        known = ", ".join(state.zero_stages)
        raise CheckpointError(f"checkpoint {folder} has no component {component!r} (it has: {known})")
    lines: list[str] = []
    if CONFIG_NAME in files:
        try:
            lines += _other_keys(component, _model_of(folder / CONFIG_NAME), corpus.config)
        except CheckpointError as error:  # such as of an older version, whose weights are as good
            logger.warning("initialize.%s: the config is not compared: %s", component, error)
    if state.tokenizer not in (None, corpus.tokenizer.fingerprint):
        lines.append(
            f"data.tokenizer: {corpus.config.data.tokenizer} is not the checkpoint's: ids mean other tokens"
        )
    if lines:
        logger.warning(
            "initialize.%s: %s was trained with other values than the config's, and may mean something else "
            "with these; give its own, unless that is intended:\n  %s",
            component,
            folder,
            "\n  ".join(lines),
        )


def _other_keys(component: str, old: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """What is said of the keys of a component that differ, but of parts that start afresh.

    Encoders that are not in both models have none.
    """
    was, now = old[component], config.model.model_dump(mode="json")[component]
    if component == "encoders":
        was, now = (
            {name: was[name] for name in was if name in now},
            {name: now[name] for name in now if name in was},
        )
    for key, before, here in _changes(f"model.{component}", was, now):
        parameters = key.removeprefix("model.") + "."  # of this part of the model
        is_new = any(fnmatch.fnmatchcase(parameters, pattern) for pattern in config.initialize.new)
        if ".adapter." not in parameters and not is_new:  # of adapters the start has its own words
            yield f"{key}: {before} in the checkpoint, {here} in the config"


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


def _other_settings(path: Path, config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """What else a run was told until a checkpoint, and is told now; nothing where its config is too old."""
    try:
        content = yaml.safe_load(path.read_text())
        content.pop("provenance", None)
        before = without_secrets(RunConfig.model_validate(content))
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, RecursionError):
        return
    now = without_secrets(config)
    for section in (name for name in now if name not in _TOLD_ELSEWHERE):
        yield from _changes(section, before[section], now[section])


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
