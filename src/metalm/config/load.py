"""Read a pipeline YAML into a RunConfig: `extends`, dotted overrides, one message for all mistakes."""

from __future__ import annotations

import difflib
import os
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from metalm.config.plain_files import MAX_DEPTH, parse_yaml, read_json_object, read_yaml
from metalm.config.pretrained_folder import fill_in_pretrained
from metalm.config.rules import check_config
from metalm.config.schema import RunConfig, SourceConfig
from metalm.errors import ConfigError
from metalm.project_files import find_file
from metalm.regular_files import path_exists, replace_file

SomeSection = typing.TypeVar("SomeSection", bound=BaseModel)

_READ_FROM = (
    "deepspeed.decoder",
    "deepspeed.encoders",
    "model.encoders.*.pretrained.path",
    "data.tokenizer",
    "data.sources.*.path",
    "data.evaluation.*.path",
    "monitor.tasks.data",
    "initialize.run",
    "initialize.decoder",
    "initialize.encoders",
)
"""Keys whose paths are looked for beside the pipeline file."""

MAX_BASES = 32
"""How long a chain of `extends` may be."""
MAX_SHOWN = 20
"""Mistakes that one message names."""

_REPLACED_KEYS: dict[tuple[type[BaseModel], str], str] = {
    (SourceConfig, "kind"): "leave it out, the index of the shards says what they hold",
    (SourceConfig, "encoder"): (
        "write `readers: {{text: {given}}}` for text, `readers: {{image: {given}, text: {given}}}` for "
        "images with captions, `readers: {{audio: {given}}}` for clips with captions"
    ),
}
"""Keys of sections in earlier versions, and what to write instead of `key: given`."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a pipeline file and `section.key=value` overrides describe, checked across sections.

    A pipeline that does not exist is looked for among those that come with MetaLM. `extends: other.yaml` (or
    a list), relative to the file or of those, gives the base that the file changes. A null takes an inherited
    mapping away. Override values are YAML. What the file names to be read is looked for beside the file, else
    from the folder in which the command is started; a DeepSpeed file then among those of MetaLM.

    Raises:
        ConfigError: a file is missing or is no YAML, a key is unknown, a value or a rule does not hold.
    """
    content = _read_pipeline(find_file(path, "pipelines", path), (), {})
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {_shown(override)} is not of the form section.key=value")
        parsed = parse_yaml(value, f"override {_shown(override)}: the value")
        parts = key.split(".")
        if len(parts) > MAX_DEPTH:
            raise ConfigError(f"override {_shown(override)} is nested too deeply")
        for part in reversed(parts):
            parsed = {part: parsed}
        content = _merge(content, parsed)
    fill_in_pretrained(content)
    typed = {override.partition("=")[0] for override in overrides}
    read = validated(RunConfig, content, str(path))
    config = _with_deepspeed_files(read, find_file(path, "pipelines", path), typed)
    check_config(
        config, *(load_deepspeed_json(p) for p in (config.deepspeed.decoder, config.deepspeed.encoders))
    )
    return config


def load_resolved_config(path: Path) -> RunConfig:
    """The config that `write_config` wrote, not checked against files outside (they may be gone)."""
    content = read_yaml(path)
    content.pop("provenance", None)
    return validated(RunConfig, content, str(path))


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file.

    Raises:
        ConfigError: the file is missing, is no JSON, or holds no object.
    """
    return read_json_object(path, "DeepSpeed config")


def config_content(config: RunConfig, provenance: Mapping[str, Any]) -> bytes:
    """The resolved config as YAML, with where it comes from (versions, commit), readable as a pipeline."""
    content = config.model_dump(mode="json") | {"provenance": dict(provenance)}
    return yaml.safe_dump(content, sort_keys=False).encode()


def write_config(config: RunConfig, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write `config_content` to a file, which is replaced at once.

    Raises:
        OSError: it could not be written; no part of it is left.
    """
    replace_file(path, config_content(config, provenance))


def _read_pipeline(path: Path, above: tuple[Path, ...], known: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """What a file and all that it extends describe.

    Args:
        path: the file.
        above: the files that it is a base of.
        known: what was read before, by path: a base of many is worked out once.
    """
    content = read_yaml(path)
    place = Path(os.path.realpath(path))
    if place in above:
        raise ConfigError(f"{path} extends itself")
    if place in known:
        return known[place]
    if len(above) == MAX_BASES:
        raise ConfigError(f"{path} is the base of a base of a base ... ({MAX_BASES} of them, at most)")
    content.pop("provenance", None)  # of the config of a run
    bases = content.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: expected a file or a list of files (given: {_shown(bases)})")
    merged: dict[str, Any] = {}
    for base in bases:
        found = find_file(path.parent / base, "pipelines", Path(base))
        merged = _merge(merged, _read_pipeline(found, (*above, place), known))
    for key in _READ_FROM:
        _place(content, key.split("."), path.parent)
    known[place] = _merge(merged, content)
    return known[place]


def _place(content: Any, key: list[str], folder: Path) -> None:
    """Where a path under the key names something in the folder, make it that."""
    if not isinstance(content, dict):
        return
    for name in list(content) if key[0] == "*" else key[:1]:
        if key[1:]:
            _place(content.get(name), key[1:], folder)
        elif isinstance(content.get(name), str) and path_exists(folder / content[name]):
            content[name] = str(folder / content[name])


def _with_deepspeed_files(config: RunConfig, pipeline: Path, typed: set[str]) -> RunConfig:
    """The config with DeepSpeed files that are the same wherever the command is started.

    Those that were typed are of the folder in which it is; others lie beside the pipeline, in the folder
    above it, or come with MetaLM. Where they do not, they are of that folder, too.
    """
    files = config.deepspeed
    found = {}
    for name, path in (("decoder", files.decoder), ("encoders", files.encoders)):
        is_beside = path.is_relative_to(pipeline.parent) and path.exists()
        if is_beside or f"deepspeed.{name}" in typed:
            found[name] = find_file(path, "deepspeed_configs", path)
        else:
            other = find_file(pipeline.parent.parent / path, "deepspeed_configs", path)
            found[name] = other if other.exists() else path
    return config.model_copy(update={"deepspeed": files.model_copy(update=found)})


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        elif isinstance(old, dict) and value is None:
            del merged[key]
        else:
            merged[key] = value
    return merged


def validated(model: type[SomeSection], content: dict[str, Any], origin: str) -> SomeSection:
    """The section that a mapping describes.

    Raises:
        ConfigError: all mistakes, by their keys.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        lines = [f"  {_describe(model, problem)}" for problem in problems[:MAX_SHOWN]]
        if len(problems) > MAX_SHOWN:
            lines.append(f"  and {len(problems) - MAX_SHOWN} more")
        raise ConfigError("\n".join([f"{origin}: {len(problems)} mistake(s)", *lines])) from None


def _describe(model: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section = _section(model, location[:-1])
        if (replacement := _REPLACED_KEYS.get((section, location[-1]))) is not None:
            return f"{where}: no longer a key; {replacement.format(given=problem['input'])}"
        known = list(section.model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{where}: required, not given"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')} (given: {_shown(problem['input'])})"


def _shown(value: Any) -> str:
    """A value for a message, cut if it is long or deep."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 160
    return shown.repr(value)


def _section(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """The section at a place in another, through mappings and lists of sections."""
    names = iter(location)
    for name in names:
        annotation: Any = model.model_fields[name].annotation
        if isinstance(annotation, types.UnionType):
            annotation = next(option for option in annotation.__args__ if option is not type(None))
        if typing.get_origin(annotation) in (dict, tuple, list):
            next(names, None)
            annotation = next(kind for kind in typing.get_args(annotation) if _is_section(kind))
        model = annotation
    return model


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
