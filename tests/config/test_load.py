from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from metalm.config import load_config, write_config
from metalm.config.load import load_resolved_config
from metalm.config.plain_files import read_yaml
from metalm.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "pipelines" / "demo.yaml"


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_numbers_and_quoted_texts_are_read_as_written(tmp_path: Path) -> None:
    written = "{a: 0, b: -1_000, c: 0.5, d: 0x10, e: '1:30', f: '010', g: 1e-4}"
    read = read_yaml(write(tmp_path, "x.yaml", written))
    assert list(read.values()) == [0, -1000, 0.5, 16, "1:30", "010", "1e-4"]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "pipelines").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_pipeline_loads(path: Path) -> None:
    assert load_config(path).run.name


def test_overrides_are_yaml_and_win() -> None:
    config = load_config(DEMO, ["run.name=x", "parallel.tensor=1", "training.optimizer.learning_rate=1e-4"])
    assert (config.run.name, config.parallel.tensor) == ("x", 1)
    assert config.training.optimizer.learning_rate == 1e-4


def test_extends_merges_in_order_and_null_removes(tmp_path: Path) -> None:
    child = f"extends: {DEMO}\nrun: {{name: child}}\ndata: {{evaluation: null}}\ntraining: {{steps: 300}}\n"
    config = load_config(write(tmp_path, "child.yaml", child))
    assert config.run.name == "child"
    assert config.training.steps == 300
    assert config.data.evaluation == {}
    assert config.data.sources.keys() == load_config(DEMO).data.sources.keys()


def test_extending_oneself_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", "training.step: unknown key; did you mean 'steps'?"),
        ("model.encoders.text.num_layer=3", "did you mean 'num_layers'?"),
        ("data.sources.text.wieght=3", "did you mean 'weight'?"),
        (
            "data.sources.scenes.encoder=scene",
            "data.sources.scenes.encoder: no longer a key; write `readers: {text: scene}` for text, "
            "`readers: {image: scene, text: scene}` for images with captions, `readers: {audio: scene}` for "
            "clips with captions",
        ),
        (
            "data.evaluation.text.kind=text",
            "data.evaluation.text.kind: no longer a key; leave it out, the index of the shards says what",
        ),
        ("nonsense=1", "known keys: run, parallel"),
        ("training.steps=many", "training.steps: "),
        ("training.steps=true", "training.steps: a number is expected; YAML reads true, yes, on"),
        ("guards.spike_sigma=on", "guards.spike_sigma: a number is expected"),
        ("checkpoint.keep_every_steps=yes", "checkpoint.keep_every_steps: a number is expected"),
        ("monitor.profile_steps=[1, yes]", "monitor.profile_steps: a number is expected"),
        ("training.optimizer.learning_rates.encoders={text: on}", "learning_rates.encoders: a number is"),
        ("training.time_limit_minutes=1:30:00", "YAML reads 1:30:00 in base 60, as 5400: write the decimal"),
        ("training.time_limit_minutes=1:30.5", "YAML reads 1:30.5 in base 60, as 90.5: write the decimal"),
        ("training.steps=010", "YAML reads 010 in base 8, as 8: write the decimal number"),
        ("run.folder=~/runs", "run.folder: ~ is not expanded in a config: write the whole path, or $HOME"),
        ("data.sources.text.path=~ann/data", "data.sources.text.path: ~ is not expanded in a config"),
        ("parallel.timeout_minutes=99999999999999", "parallel.timeout_minutes: Input should be less than"),
        ("training.steps", "not of the form section.key=value"),
        ("training.steps=[1", "the value is not YAML"),
        ("run.name=../up", "run.name: it names a folder: letters, digits, dots, underscores and hyphens"),
        ("data.sources={A-b: {path: x}}", "data.sources.A-b: such a name has small letters, digits and"),
        ("model.encoders={X1: {}}", "model.encoders.X1: such a name has small letters, digits and"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, [override])
    assert message in str(caught.value)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ConfigError, match="2 mistake") as caught:
        load_config(DEMO, ["training.step=1", "run.nmae=x"])
    assert "did you mean 'name'?" in str(caught.value)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'name' is given twice"):
        load_config(write(tmp_path, "twice.yaml", "run:\n  name: a\n  name: b\n"))


@pytest.mark.parametrize("text", ["[1, 2]", "run: !!python/object/apply:os.system ['true']", "run: {"])
def test_what_is_no_plain_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, "bad.yaml", text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")


def test_a_config_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_config(load_config(DEMO), tmp_path / "config.yaml", {})
    assert list(tmp_path.iterdir()) == []


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(DEMO)
    write_config(config, tmp_path / "config.yaml", {"commit": "abc"})
    assert load_resolved_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["provenance"] == {"commit": "abc"}
