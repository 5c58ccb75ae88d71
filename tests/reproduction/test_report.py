"""The report, from made-up results."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from metalm.errors import ConfigError
from metalm.reproduction.arms import Setting
from metalm.reproduction.claim import jobs_of
from metalm.reproduction.jobs import Marks
from metalm.reproduction.report import write_report
from metalm.reproduction.results import results_of
from reproduction.made_up import GPT, METALM, SHUFFLED, claim, write_scores


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    found = Setting(tmp_path / "data", tmp_path / "out", "cpu", 3)
    package = {"package": "invented", "version": "1.2", "licence": "MIT", "sha256": "abc123"}
    (tmp_path / "data/invented").mkdir(parents=True)
    (tmp_path / "data/invented/SOURCE.json").write_text(json.dumps({"packages": [package]}))
    write_scores(found, METALM, [0.80, 0.82, 0.81])
    write_scores(found, GPT, [0.60, 0.63, 0.61])
    write_scores(found, SHUFFLED, [0.49, 0.52, 0.50])
    return found


def report(setting: Setting, tried: str = "") -> tuple[str, str]:
    shared, *_ = jobs_of([(claim(tried), setting)])
    Marks(setting.out).write(shared, seconds=90.0)
    write_report([results_of(claim(tried), setting)], setting, lambda line: None)
    return (setting.out / "report.md").read_text(), (setting.out / "report.html").read_text()


def test_the_report_has_verdict_intervals_and_where_data_come_from(setting: Setting) -> None:
    markdown, page = report(setting)
    values = np.array([0.80, 0.82, 0.81])
    half = stats.sem(values) * stats.t.ppf(0.975, 2)
    row = next(line for line in markdown.splitlines() if line.startswith("| x: MetaLM above GPT"))
    assert f"81.0 ± {100 * half:.1f} (m)" in row
    assert "GPT 65.0; MetaLM 79.1" in row
    assert row.endswith("| shown |")
    for part in (
        "80.0, 82.0, 81.0",
        "0.001",
        "77 in 5,120 tokens",
        "400",
        "invented 1.2, MIT, sha256 abc123",
    ):
        assert part in markdown
        assert part in page
    assert "has fallen to chance (50.0%)" in markdown
    assert re.search(r"\| shared/data \| 1\.5 \|", markdown)


def test_the_page_holds_its_pictures(setting: Setting) -> None:
    markdown, page = report(setting)
    assert "![scores and learning curves of claim x](claim_x.png)" in markdown
    assert (setting.out / "claim_x.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r'<img src="data:image/png;base64,[\w+/=]{1000,}"', page)) == 1
    assert "http" not in page


def test_what_was_tried_is_said_where_a_claim_is_not_shown(setting: Setting) -> None:
    assert "What was tried: twice the steps" not in report(setting, "twice the steps")[0]
    write_scores(setting, GPT, [0.80, 0.79, 0.83])
    assert "What was tried: twice the steps" in report(setting, "twice the steps")[0]


def test_a_leak_is_named(setting: Setting) -> None:
    write_scores(setting, SHUFFLED, [0.70, 0.71, 0.72])
    assert "IS ABOVE CHANCE" in report(setting)[0]
    write_scores(setting, SHUFFLED, [0.30, 0.30, 0.31])
    assert "is below chance, so that nothing leaks" in report(setting)[0]


def test_what_is_asked_in_part_is_no_seed(setting: Setting) -> None:
    """An evaluation of several tasks writes its results after each."""
    (setting.out / "jobs/m--seed_3.json").unlink()
    markdown, _ = report(setting)
    assert "80.0, 82.0; 2 of 3 seeds" in markdown
    row = next(line for line in markdown.splitlines() if line.startswith("| x: MetaLM above GPT"))
    assert "(m; 2 of 3 seeds)" in row and row.endswith("| not done |")


def test_results_of_other_settings_are_refused(setting: Setting) -> None:
    with pytest.raises(ConfigError, match="m/seed_1 was made with other settings"):
        results_of(claim(), replace(setting, scale="gpu"))


def test_half_of_a_comparison_has_no_verdict(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path, "cpu", 3)
    write_scores(setting, METALM, [0.8, 0.8, 0.8])
    found = results_of(claim(), setting)
    assert found.verdict == "not done"
    assert not found.judged


def test_a_comparison_without_all_its_seeds_has_no_verdict(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path, "cpu", 3)
    write_scores(setting, METALM, [0.8, 0.81, 0.8])
    write_scores(setting, GPT, [0.6, 0.61])
    found = results_of(claim(), setting)
    assert found.verdict == "not done"
    assert not found.judged


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path, "cpu", 3)
    with pytest.raises(ConfigError, match="there are no scores"):
        write_report([results_of(claim(), setting)], setting, print)
