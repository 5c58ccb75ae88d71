"""Today's model code in a folder that was exported before."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from conversion.conftest import Workshop
from conversion.test_export import REPOSITORY
from distributed.ranks import run_command
from metalm.conversion import refresh
from metalm.conversion.proof import ProofPrompt
from metalm.conversion.refresh import BEFORE_SUFFIX, MARKER_NAME, refresh_export
from metalm.conversion.shipped.configuration_metalm import MetaLMConfig
from metalm.conversion.shipped.modeling_metalm import MetaLMForConditionalGeneration
from metalm.errors import CheckpointError, ConfigError

KIND = "deepnorm"
RIGHT, WRONG = "cache = _one_cache(cache, past_key_values)\n        if (", "cache = None\n        if ("


@pytest.fixture
def old(workshop: Workshop, tmp_path: Path) -> Path:
    """As exported before: its code begins an empty cache at every step, and its config says less."""
    folder = tmp_path / "old"
    shutil.copytree(workshop.exported(KIND), folder)
    code = (folder / "modeling_metalm.py").read_text()
    assert code.count(RIGHT) == 1
    (folder / "modeling_metalm.py").write_text(code.replace(RIGHT, WRONG))
    config = json.loads((folder / "config.json").read_text())
    del config["proved_on_transformers"], config["own_token_offset"]
    del config["auto_map"]["AutoModelForMultimodalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").unlink()
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".partial", BEFORE_SUFFIX])
def test_what_others_keep_beside_it_stays(old: Path, suffix: str) -> None:
    other = old.with_name(old.name + suffix)
    other.mkdir()
    (other / "notes").write_text("mine")
    before = content(old)
    with pytest.raises(ConfigError, match="is in the way, and nothing that this tool left behind"):
        refresh_export(old)
    assert content(other) == {"notes": b"mine"}
    assert content(old) == before


def test_it_has_todays_code_and_is_proved(workshop: Workshop, old: Path) -> None:
    tool = str(REPOSITORY / "tools" / "refresh_export.py")
    code, output = run_command([sys.executable, tool, str(old)], timeout_s=280)
    assert code == 0 and "proof: a span of vision" in output, output
    assert [path.name for path in old.parent.iterdir()] == ["old"]
    exported, refreshed = content(workshop.exported(KIND)), content(old)
    assert refreshed.keys() == exported.keys()
    assert refreshed["modeling_metalm.py"] == exported["modeling_metalm.py"]
    assert json.loads(refreshed["config.json"])["proved_on_transformers"] == transformers.__version__
    auto = json.loads(refreshed["config.json"])["auto_map"]
    assert auto == json.loads(exported["config.json"])["auto_map"]


def test_code_that_says_something_else_is_not_put_in(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = refresh.write_model_code

    def forgets(folder: Path) -> None:
        real(folder)
        path = folder / "modeling_metalm.py"
        path.write_text(path.read_text().replace(RIGHT, WRONG))

    monkeypatch.setattr(refresh, "write_model_code", forgets)
    monkeypatch.setattr(refresh, "_prompts", lambda folder: {"text": ProofPrompt("the quick brown")})
    before = content(old)
    with pytest.raises(CheckpointError, match=r"text, cached: generated token \d+ of \d+ is"):
        refresh_export(old)
    assert content(old) == before and [path.name for path in old.parent.iterdir()] == ["old"]


def test_a_refresh_that_was_cut_off_leaves_the_folder_findable(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its two renames, it finds the folder again."""
    before = content(old)
    old.replace(old.with_name(old.name + BEFORE_SUFFIX))
    old.with_name("old.partial").mkdir()
    for left in (BEFORE_SUFFIX, ".partial"):
        (old.with_name(old.name + left) / MARKER_NAME).touch()

    def fails(*unused: Any) -> list[str]:
        raise CheckpointError("no proof")

    monkeypatch.setattr(refresh, "_prove", fails)
    with pytest.raises(CheckpointError, match="no proof"):
        refresh_export(old)
    assert content(old) == before and [path.name for path in old.parent.iterdir()] == ["old"]


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not an exported model"):
        refresh_export(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="of a model 'gpt2'"):
        refresh_export(tmp_path)


def test_a_newer_transformers_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    for proved, times in ((f"{major}.{minor - 1}.9", 1), (f"{major}.{minor}.0", 0), (None, 0)):
        caplog.clear()
        for _ in range(2):
            MetaLMForConditionalGeneration(MetaLMConfig(proved_on_transformers=proved))
        assert caplog.text.count("was proved on") == times


def test_the_folder_one_is_in_is_meant_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "demo"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(ConfigError, match=f"{inside} is not an exported model"):
        refresh_export(Path())


def test_it_is_refreshed_from_inside_and_through_a_link(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(old)
    monkeypatch.setattr(refresh, "_prove", lambda *_: [])
    monkeypatch.chdir(old)
    for given in (Path(), tmp_path / "link"):
        refresh_export(given)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]
        assert (tmp_path / "link").is_symlink() and RIGHT in (old / "modeling_metalm.py").read_text()
