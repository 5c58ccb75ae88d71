"""Exported folders that were damaged or tampered with: refused by name before they say anything."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conversion.conftest import Workshop
from metalm.config.foreign_folder import read_foreign_config
from metalm.conversion.generate import FolderModel, generate_from_folder
from metalm.conversion.restore import FolderWeights
from metalm.errors import ConfigError, MetaLMError
from mutations import mutate_bytes, mutate_value

KIND = "deepnorm"
LIGHT_MUTATIONS, LOADED = 600, 40
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(workshop: Workshop, tmp_path: Path) -> Path:
    """A copy with all weights in one file."""
    copy = Path(shutil.copytree(workshop.exported(KIND), tmp_path / "copy"))
    weights = {}
    for path in copy.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (copy / INDEX).unlink(missing_ok=True)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def refusal(folder: Path) -> str:
    with pytest.raises(MetaLMError) as caught:
        FolderModel(folder)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_that_are_not_there_are_never_drawn(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[3]
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    assert f"has 1 weight(s) that are missing: {name}" in refusal(folder)
    save_file({**weights, "more": weights[name].clone()}, path, {"format": "pt"})
    assert "that are unexpected: more" in refusal(folder)
    save_file({**weights, name: weights[name].flatten()[:3].clone()}, path, {"format": "pt"})
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize(
    "value",
    ["kernels-community/flash-attn", {"": "sdpa", "encoders": "someone/code"}, "a\0b", "../x"],
    ids=str,
)
@pytest.mark.parametrize(
    "key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"]
)
def test_attention_from_a_repository_is_refused(folder: Path, key: str, value: Any) -> None:
    edit(folder / "config.json", **{key: value})
    assert "would fetch code from there" in refusal(folder)


def test_it_is_refused_inside_the_config_of_an_encoder_too(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(
        folder / "config.json", encoders={"a": [{"b": {"_attn_implementation": "x/y"}}]} | config["encoders"]
    )
    assert "would fetch code from there" in refusal(folder)
    edit(folder / "config.json", **config, _attn_implementation="sdpa")
    generate_from_folder(folder, "the fox", max_new_tokens=1)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", "model.bin", 3, None]
)
@pytest.mark.parametrize("read", [FolderModel, FolderWeights])
def test_weights_outside_the_folder_are_refused(folder: Path, read: Callable[[Path], Any], file: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"x": file}}))
    with pytest.raises(MetaLMError, match="points outside its folder|not an index of weights"):
        read(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_what_is_no_file_is_refused_at_once(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "no regular file" in refusal(folder)


def test_a_tokenizer_at_which_the_library_panics_is_one_message(folder: Path) -> None:
    edit(folder / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    assert "cannot be loaded" in refusal(folder)


def test_no_mutation_of_config_or_weight_index_ends_in_anything_but_a_message(folder: Path) -> None:
    chance = random.Random(9)
    path, index = folder / "config.json", folder / INDEX
    original = path.read_bytes()
    map_ = {"metadata": {"total_size": 3}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    for number in range(LIGHT_MUTATIONS):
        if number % 3 == 0:
            path.write_bytes(mutate_bytes(original, chance))
        elif number % 3 == 1:
            path.write_text(json.dumps(mutate_value(json.loads(original), chance)))
        else:
            index.write_text(json.dumps(mutate_value(map_, chance)))
        try:
            read_foreign_config(folder)
            FolderWeights(folder).check({})
        except MetaLMError:
            pass
        path.write_bytes(original)
        index.unlink(missing_ok=True)


def test_mutated_folders_are_refused_or_say_something(folder: Path) -> None:
    """Through all loaders; a header of weights that was changed is always found."""
    chance, refused = random.Random(10), 0
    names = ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json")
    original = {name: (folder / name).read_bytes() for name in names}
    header = 8 + int.from_bytes(original["model.safetensors"][:8], "little")
    for number in range(LOADED):
        name = names[number % len(names)]
        content = original[name]
        if name == "model.safetensors":
            content = mutate_bytes(content[:header], chance) + content[header:]
        elif number % 8 < 4:
            content = json.dumps(mutate_value(json.loads(content), chance)).encode()
        else:
            content = mutate_bytes(content, chance)
        (folder / name).write_bytes(content)
        try:
            model = FolderModel(folder)
        except MetaLMError as error:
            refused += 1
            assert isinstance(error, ConfigError) or name != "model.safetensors" or str(folder) in str(error)
        else:
            assert (
                name != "model.safetensors"
                or content == original[name]
                or _same_tensors(folder, original[name])
            )
            del model
        (folder / name).write_bytes(original[name])
    assert refused > LOADED // 3


def _same_tensors(folder: Path, content: bytes) -> bool:
    """Whether a changed header still says the same: its metadata are no weights."""
    (folder / "before.safetensors").write_bytes(content)
    found, expected = load_file(folder / "model.safetensors"), load_file(folder / "before.safetensors")
    (folder / "before.safetensors").unlink()
    return found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in found)
