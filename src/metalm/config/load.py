"""Read a pipeline YAML into a RunConfig: `extends`, dotted overrides, one message for all mistakes."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from metalm.config.pretrained_folder import fill_in_pretrained
from metalm.config.rules import check_config
from metalm.config.schema import RunConfig, SourceConfig
from metalm.errors import ConfigError
from metalm.project_files import find_file

_READ_FROM = (
    "deepspeed.decoder",
    "deepspeed.encoders",
    "model.encoders.*.pretrained.path",
    "data.tokenizer",
    "data.sources.*.path",
    "data.evaluation.*.path",
    "initialize.decoder",
    "initialize.encoders",
)
"""Keys whose paths are looked for beside the pipeline file."""

_REPLACED_KEYS: dict[tuple[type[BaseModel], str], str] = {
    (SourceConfig, "kind"): "leave it out, the index of the shards says what they hold",
    (SourceConfig, "encoder"): (
        "write `readers: {{text: {given}}}` for text, `readers: {{image: {given}, text: {given}}}` for "
        "images with captions, `readers: {{audio: {given}}}` for clips with captions"
    ),
}
"""Keys of sections in earlier versions, and what to write instead of `key: given`."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML would silently let win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep=deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a pipeline file and `section.key=value` overrides describe, checked across sections.

    A pipeline that does not exist is looked for among those that come with MetaLM. `extends: other.yaml` (or
    a list), relative to the file or of those, gives the base that the file changes. A null takes an inherited
    mapping away. Override values are YAML. What the file names to be read is looked for beside the file, else
    from the folder in which the command is started; a DeepSpeed file then among those of MetaLM.

    Raises:
        ConfigError: a file is missing or is no YAML, a key is unknown, a value or a rule does not hold.
    """
    content = _read_pipeline(find_file(path, "pipelines", path), seen=())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        try:
            parsed = yaml.load(value, _UniqueKeyLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not YAML ({error})") from None
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        content = _merge(content, parsed)
    fill_in_pretrained(content)
    typed = {override.partition("=")[0] for override in overrides}
    config = _with_deepspeed_files(_validate(content, str(path)), find_file(path, "pipelines", path), typed)
    check_config(
        config, *(load_deepspeed_json(p) for p in (config.deepspeed.decoder, config.deepspeed.encoders))
    )
    return config


def load_resolved_config(path: Path) -> RunConfig:
    """The config that `write_config` wrote, not checked against files outside (they may be gone)."""
    content = _read_yaml(path)
    content.pop("provenance", None)
    return _validate(content, str(path))


def load_deepspeed_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file.

    Raises:
        ConfigError: the file is missing, is no JSON, or holds no object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"DeepSpeed config {path} does not exist") from None
    except ValueError as error:
        raise ConfigError(f"DeepSpeed config {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"DeepSpeed config {path} must hold an object, not {type(content).__name__}")
    return content


def config_content(config: RunConfig, provenance: Mapping[str, Any]) -> bytes:
    """The resolved config as YAML, with where it comes from (versions, commit), readable as a pipeline."""
    content = config.model_dump(mode="json") | {"provenance": dict(provenance)}
    return yaml.safe_dump(content, sort_keys=False).encode()


def write_config(config: RunConfig, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write `config_content` to a file, which is replaced at once."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(config_content(config, provenance))
    partial.replace(path)


def _read_pipeline(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself")
    content = _read_yaml(path)
    bases = content.pop("extends", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        found = find_file(path.parent / base, "pipelines", Path(base))
        merged = _merge(merged, _read_pipeline(found, (*seen, path.resolve())))
    for key in _READ_FROM:
        _place(content, key.split("."), path.parent)
    return _merge(merged, content)


def _place(content: Any, key: list[str], folder: Path) -> None:
    """Where a path under the key names something in the folder, make it that."""
    if not isinstance(content, dict):
        return
    for name in list(content) if key[0] == "*" else key[:1]:
        if key[1:]:
            _place(content.get(name), key[1:], folder)
        elif isinstance(content.get(name), str) and (folder / content[name]).exists():
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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(), _UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config {path} must hold a mapping, not {type(content).__name__}")
    return content


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


def _validate(content: dict[str, Any], origin: str) -> RunConfig:
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = [f"  {_describe(problem)}" for problem in error.errors()]
        raise ConfigError("\n".join([f"{origin}: {len(lines)} mistake(s)", *lines])) from None


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section = _section(location[:-1])
        if (replacement := _REPLACED_KEYS.get((section, location[-1]))) is not None:
            return f"{where}: no longer a key; {replacement.format(given=problem['input'])}"
        known = list(section.model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{where}: required, not given"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')} (given: {problem['input']!r})"


def _section(location: list[str]) -> type[BaseModel]:
    model: type[BaseModel] = RunConfig
    names = iter(location)
    for name in names:
        annotation: Any = model.model_fields[name].annotation
        if typing.get_origin(annotation) is dict:
            next(names, None)
            annotation = typing.get_args(annotation)[1]
        if isinstance(annotation, types.UnionType):
            annotation = next(option for option in annotation.__args__ if option is not type(None))
        model = annotation
    return model
