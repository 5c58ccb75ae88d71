"""Where a pipeline and what it names are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalm.config import load_config
from metalm.config.load import load_deepspeed_json
from metalm.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "started_here").mkdir()
    monkeypatch.chdir(tmp_path / "started_here")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["demo.yaml", "pipelines/demo.yaml"])
def test_a_pipeline_that_comes_with_metalm_is_found_by_its_name(name: str) -> None:
    config = load_config(Path(name))
    assert config.run.name == "demo"
    assert config.deepspeed.encoders == REPOSITORY / "deepspeed_configs/encoders_zero3.json"


def test_a_pipeline_of_that_name_in_this_folder_wins(tmp_path: Path) -> None:
    write(Path("demo.yaml"), "extends: pretrain_language_tiny.yaml\nrun: {name: mine}\n")
    assert load_config(Path("demo.yaml")).run.name == "mine"


def test_a_name_that_nothing_has_is_refused_as_typed() -> None:
    with pytest.raises(ConfigError, match=r"config demos\.yaml does not exist"):
        load_config(Path("demos.yaml"))


def test_what_lies_beside_the_pipeline_is_read_first(tmp_path: Path) -> None:
    write(tmp_path / "mine/data/demo/shards/text_train/index.json", "{}")
    write(tmp_path / "started_here/data/demo/shards/text_train/index.json", "{}")
    zero = '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}'
    write(tmp_path / "mine/deepspeed_configs/decoder_zero1.json", zero)
    mine = write(tmp_path / "mine/mine.yaml", (REPOSITORY / "pipelines/demo.yaml").read_text())
    config = load_config(mine, ["run.name=mine"])
    assert config.data.sources["text"].path == tmp_path / "mine/data/demo/shards/text_train"
    assert config.data.sources["scenes"].path == Path("data/demo/shards/scenes_train")
    assert load_deepspeed_json(config.deepspeed.decoder)["zero_optimization"]["reduce_bucket_size"] == 7
    assert config.run.folder == Path("runs")


def test_deepspeed_files_are_the_same_wherever_the_command_is_started(tmp_path: Path) -> None:
    other = '{"zero_optimization": {"stage": 2}}'
    name = "deepspeed_configs/decoder_zero1.json"
    here = write(tmp_path / "started_here" / name, other)
    assert load_config(Path("demo.yaml")).deepspeed.decoder == REPOSITORY / name
    assert load_config(Path("demo.yaml"), [f"deepspeed.decoder={name}"]).deepspeed.decoder == Path(name)
    mine = write(tmp_path / "mine/pipelines/mine.yaml", (REPOSITORY / "pipelines/demo.yaml").read_text())
    assert load_config(mine).deepspeed.decoder == REPOSITORY / name
    above = write(tmp_path / "mine" / name, other)
    assert load_config(mine).deepspeed.decoder.resolve() == above
    write(mine, mine.read_text().replace(name, "decoder.json"))
    write(here.parents[1] / "decoder.json", other)
    assert load_config(mine).deepspeed.decoder == Path("decoder.json")


def test_a_path_on_the_command_line_is_of_this_folder(tmp_path: Path) -> None:
    write(tmp_path / "mine/other/tokenizer.json", "{}")
    mine = write(tmp_path / "mine/mine.yaml", "extends: demo.yaml\n")
    assert load_config(mine, ["data.tokenizer=other"]).data.tokenizer == Path("other")
