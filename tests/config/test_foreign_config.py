"""Configs that nobody would write by hand: one message with file and key, no trace, no wait."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import yaml

from metalm.config import load_config
from metalm.config.schema import RunConfig
from metalm.config.section import Section
from metalm.errors import ConfigError, TopologyError
from mutations import mutate_bytes, mutate_value

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "pipelines" / "demo.yaml"
MUTATIONS = 600


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert len(str(caught.value)) < 5000
    return str(caught.value)


LAUGHS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: 3\n", r"extends: expected a file or a list of files \(given: 3\)"),
        ("extends: [3]\n", "extends: expected a file"),
        ("extends: {a: b}\n", "extends: expected a file"),
        ('extends: "a\\0b"\n', "no file has such a name"),
        ("extends: .\n", "Is a directory|no regular file"),
        (LAUGHS, "its aliases stand for more than 200,000 values"),
        ("run: &a {name: *a}\n", "a value holds itself by an alias"),
        ("run: &a\n  - *a\n", "a value holds itself"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: " + "{b: " * 100 + "1" + "}" * 100, "nested too deeply"),
        ("".join(f"{'  ' * n}a:\n" for n in range(100)), "nested too deeply"),
        ("a: 2001-99-99\n", "is not YAML: month must be"),
        ("a: !!bool x\n", "is not YAML"),
        ("a: !!timestamp x\n", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("? [a]\n: 1\n", "a key is no plain word"),
        ("run: {name: x, name: y}\n", r"'name' is given twice[^']*line 1"),
        ("\0", "is not YAML"),
        ("3: 4\n", "3: "),
        ("".join(f"k{n}: 1\n" for n in range(20_000)), "and 19984 more|and [0-9]+ more"),
    ],
    ids=lambda value: value[:24],
)
def test_what_no_config_holds_is_named_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "odd.yaml" in str(caught.value) or "extends: ." in text or "\\0" in text
    assert len(str(caught.value)) < 20_000


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xe4}\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (5 << 20))
    assert "it is no regular file" in refusal(tmp_path / "pipe.yaml")
    assert "it is no regular file" in refusal(tmp_path / "folder.yaml")
    assert "is not UTF-8" in refusal(tmp_path / "latin.yaml")
    assert "at most" in refusal(tmp_path / "large.yaml")
    assert "no file has such a name" in refusal(Path("a\0b"))
    assert "File name too long" in refusal(Path("x" * 300))
    for name in ("pipe.yaml", "folder.yaml"):
        assert "DeepSpeed config" in refusal(DEMO, f"deepspeed.decoder={tmp_path / name}")


def test_a_base_of_many_is_read_once_and_chains_end(tmp_path: Path) -> None:
    """Each of 25 files extends the next twice: 2^25 readings, if they were not remembered."""
    for number in range(25):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "25.yaml").write_text(f"extends: {DEMO}\n")
    assert load_config(tmp_path / "0.yaml") == load_config(DEMO)
    for number in range(25, 50):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert "32 of them, at most" in refusal(tmp_path / "0.yaml")


def test_a_byte_order_mark_and_a_merge_key_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mark.yaml"
    path.write_text("\ufeffextends: " + str(DEMO) + "\nrun: &r {name: a}\n")
    assert load_config(path).run.name == "a"
    path.write_text(f"extends: {DEMO}\nrun: &r {{name: a, seed: 7}}\n")
    assert load_config(path, ["run={<<: {seed: 8}, name: b}"]).run.seed == 8


NUMBERS = [f"data.sources.text.weight={value}" for value in (".inf", "-.inf", ".nan", "1e999")] + [
    "training.optimizer.learning_rate=.inf",
    "training.optimizer.betas=[.nan, 0.9]",
    "guards.spike_sigma=.inf",
]


@pytest.mark.parametrize("override", [*NUMBERS, f"run.seed={2**100}", f"training.steps={2**63}"])
def test_numbers_that_are_none_are_refused(override: str) -> None:
    key = override.partition("=")[0]
    assert f"  {key}" in refusal(DEMO, override)


def test_no_float_of_any_section_takes_infinity() -> None:
    """Found by the schema itself: every section there is refuses them."""
    sections = [Section]
    for section in sections:
        sections += section.__subclasses__()
    assert RunConfig in sections and len(sections) > 20
    assert all(section.model_config["allow_inf_nan"] is False for section in sections)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_optimization": 3}', "zero_optimization must hold an object"),
        ('{"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}', "offload_optimizer must hold"),
        ('{"zero_optimization": {"stage": true}}', "stage must be 1, 2 or 3, not True"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "key 'stage' is given twice"),
        ("[" * 100_000, "nested too deeply"),
        ("\x80", "is not JSON"),
    ],
    ids=lambda value: value[:30],
)
def test_deepspeed_files_of_other_forms_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content, encoding="latin-1")
    found = refusal(DEMO, f"deepspeed.decoder={path}")
    assert message in found and str(path) in found


SMALL = """
run: {name: small, folder: runs, seed: 3}
parallel: {tensor: 1}
model:
  vocab_size: 300
  decoder: {num_layers: 1, hidden_size: 16, num_heads: 2, rope_scaling: {factor: 2}, positions: rope}
  encoders:
    text: {num_layers: 1, hidden_size: 16, num_heads: 2, max_text_positions: 16, relative_bias: {}}
    image: {num_layers: 1, hidden_size: 16, num_heads: 2, max_text_positions: 6, image: {image_size: 16, patch_size: 8}}
data:
  tokenizer: x
  sequence_length: 64
  lanes: 4
  spans: {fraction: 0.25, min_length: 4, max_length: 8}
  sources:
    text: {path: x, readers: {text: text}, weight: 2.5}
    pairs: {path: y, readers: {image: image, text: image}, url: "https://host/{shard}"}
training: {steps: 10, global_batch_size: 8, micro_batch_size: 2, optimizer: {betas: [0.9, 0.95]}, schedule: {warmup_steps: 2}}
initialize: {decoder: runs/other, new: [a, b]}
"""  # noqa: E501


def test_no_mutation_of_a_pipeline_ends_in_anything_but_a_message(tmp_path: Path) -> None:
    chance, path = random.Random(41), tmp_path / "mutated.yaml"
    path.write_text(SMALL)
    load_config(path)
    content, refused = yaml.safe_load(SMALL), 0
    for number in range(MUTATIONS):
        if number % 3 == 0:
            path.write_bytes(mutate_bytes(SMALL.encode(), chance))
        else:
            path.write_text(json.dumps(mutate_value(content, chance)))  # which is YAML, too
        try:
            load_config(path)
        except (ConfigError, TopologyError):
            refused += 1
    assert refused > MUTATIONS // 2
