"""The table of a README and what is kept beside it, from made-up results."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from metalm.errors import EXIT_USAGE, ConfigError
from metalm.project_files import project_root
from metalm.reproduction.arms import Setting
from metalm.reproduction.claim import Claim, Comparison, Series
from metalm.reproduction.jobs import Marks
from metalm.reproduction.readme import markers, write_into
from metalm.reproduction.report import write_report
from metalm.reproduction.results import results_of
from reproduction.made_up import GPT, METALM, SHUFFLED, arm, claim, write_scores

CLAIMS = {
    "x": lambda setting: claim(),
    "y": lambda setting: replace(claim(), letter="y"),
}
BEGIN, END = markers("cpu")


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def ran(
    setting: Setting, letter: str, metalm: list[float], commit: str, monkeypatch: pytest.MonkeyPatch
) -> Claim:
    """A claim whose jobs were done by a commit."""
    found = CLAIMS[letter](setting)
    monkeypatch.setattr("metalm.reproduction.jobs.git_commit", lambda: commit * 40)
    for series, values in ((METALM, metalm), (GPT, [0.60, 0.63, 0.61]), (SHUFFLED, [0.49, 0.52, 0.50])):
        write_scores(setting, series, values)
    Marks(setting.out).write(found.shared[0], seconds=90.0)
    return found


def write(readme: Path, setting: Setting, one: Claim) -> str:
    write_into(readme, [results_of(one, setting)], setting, CLAIMS)
    return readme.read_text()


def test_the_table_stands_between_its_markers_and_the_rest_stays(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, tmp_path / "out", "cpu", 3)
    one = ran(setting, "x", [0.80, 0.82, 0.81], "a", monkeypatch)
    told = write(readme, setting, one)
    assert told.startswith(f"before\n{BEGIN}\n| claim |")
    assert told.endswith(f"{END}\nafter\n")
    assert "![scores with their intervals](tools/measured/reproduction_cpu.png)" in told
    assert f"commit {'a' * 12}. Minutes of jobs, one after another: x 10." in told
    assert "old" not in told
    assert (tmp_path / "tools/measured/reproduction_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert write(readme, setting, one) == told


def test_claims_that_were_run_elsewhere_keep_their_rows_and_figures(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Setting(tmp_path, tmp_path / name, "cpu", 3) for name in ("first", "second"))
    write(readme, second, ran(second, "y", [0.59, 0.63, 0.60], "b", monkeypatch))
    told = write(readme, first, ran(first, "x", [0.80, 0.82, 0.81], "a", monkeypatch))
    rows = [line for line in told.splitlines() if line.startswith(("| x:", "| y:"))]
    assert [row[:4] for row in rows] == ["| x:", "| y:"]
    assert rows[0].endswith("| shown |") and rows[1].endswith("| not shown |")
    assert f"commit {'a' * 12} (x), {'b' * 12} (y)." in told
    kept = json.loads((tmp_path / "tools/measured/reproduction_cpu.json").read_text())
    assert kept["y"]["series"]["m, test"]["by_seed"] == {"1": 0.59, "2": 0.63, "3": 0.60}
    assert kept["x"]["minutes"] == 10.5
    assert kept["x"]["arms"]["m"] == {"rate": 0.001, "tokens": 5120, "examples": 77}
    assert [curve["arm"] for curve in kept["x"]["curves"]] == ["m", "g", "s"]


def test_the_table_says_in_which_precision_its_claims_were_trained(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Setting(tmp_path, tmp_path / "first", "cpu", 3, "bf16")
    one = ran(narrow, "x", [0.80, 0.82, 0.81], "a", monkeypatch)
    assert "3 seeds at scale `cpu`, in bf16; " in write(readme, narrow, one)
    write_report([results_of(one, narrow)], narrow, lambda line: None)
    assert "Scale cpu, in bf16, 3 seeds." in (narrow.out / "report.md").read_text()
    assert Marks(narrow.out).precision(one.jobs(narrow)) == "bf16"
    wide = Setting(tmp_path, tmp_path / "second", "cpu", 3, "fp32")
    told = write(readme, wide, ran(wide, "y", [0.59, 0.63, 0.60], "a", monkeypatch))
    assert "3 seeds at scale `cpu`, in bf16 (x), fp32 (y); " in told
    kept = tmp_path / "tools/measured/reproduction_cpu.json"
    assert [one["precisions"] for one in json.loads(kept.read_text()).values()] == [["bf16"], ["fp32"]]


def test_a_claim_that_is_not_whole_changes_nothing(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, tmp_path / "out", "cpu", 3)
    one = ran(setting, "x", [0.80, 0.82], "a", monkeypatch)
    before = readme.read_text()
    with pytest.raises(ConfigError, match="no claim in .* is whole yet"):
        write(readme, setting, one)
    assert readme.read_text() == before
    assert not (tmp_path / "tools").exists()


def test_a_readme_without_a_place_for_the_table_is_refused(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, tmp_path / "out", "cpu", 3)
    one = ran(setting, "x", [0.80, 0.82, 0.81], "a", monkeypatch)
    readme.write_text("\n".join(markers("gpu")))
    with pytest.raises(ConfigError, match="expected the lines"):
        write(readme, setting, one)
    assert not (tmp_path / "tools").exists()


def test_rows_of_claims_without_figures_are_not_lost(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, tmp_path / "out", "cpu", 3)
    one = ran(setting, "x", [0.80, 0.82, 0.81], "a", monkeypatch)
    before = f"{BEGIN}\n| claim |\n| --- |\n| y: better | 1 |\n| x: old | 2 |\n{END}\n| z: elsewhere |\n"
    readme.write_text(before)
    with pytest.raises(ConfigError, match="table has claim y, of which no figures are kept"):
        write(readme, setting, one)
    assert readme.read_text() == before
    assert not (tmp_path / "tools").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"x": {"seeds": "three"}}'])
def test_figures_that_are_none_are_refused(
    content: str, readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, tmp_path / "out", "cpu", 3)
    one = ran(setting, "x", [0.80, 0.82, 0.81], "a", monkeypatch)
    kept = tmp_path / "tools/measured/reproduction_cpu.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(content)
    before = readme.read_text()
    with pytest.raises(ConfigError, match=r"reproduction_cpu\.json does not hold figures .*: restore it"):
        write(readme, setting, one)
    assert (readme.read_text(), kept.read_text()) == (before, content)


def test_a_kept_claim_that_has_changed_is_not_shown_as_not_done(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Setting(tmp_path, tmp_path / name, "cpu", 3) for name in ("first", "second"))
    write(readme, second, ran(second, "y", [0.59, 0.63, 0.60], "b", monkeypatch))
    kept = tmp_path / "tools/measured/reproduction_cpu.json"
    kept.write_text(kept.read_text().replace('"g, test"', '"g, tests"'))
    before = readme.read_text()
    with pytest.raises(ConfigError, match="no figures of today's claim y: run and report it again"):
        write(readme, first, ran(first, "x", [0.80, 0.82, 0.81], "a", monkeypatch))
    assert readme.read_text() == before


def tool(monkeypatch: pytest.MonkeyPatch, *words: object) -> object:
    """The exit code of tools/reproduce.py on the made-up claims."""
    monkeypatch.setattr("metalm.reproduction.claims.CLAIMS", CLAIMS)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(project_root() / "tools/reproduce.py"), run_name="__main__")
    return ended.value.code


def test_the_tool_reports_into_a_readme(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the precision of what is done, and with the other claims of which there are results."""
    setting = Setting(tmp_path, tmp_path / "out", "cpu", 3, "bf16")
    ran(setting, "x", [0.80, 0.82, 0.81], "a", monkeypatch)
    monkeypatch.setattr("metalm.reproduction.this_machine.usual_precision", lambda scale: "fp32")
    typed = ["--only", "x", "--report", "--readme", readme, "--data", tmp_path, "--out", setting.out]
    assert tool(monkeypatch, *typed, "--seeds", "3") == 0
    assert "x: An invented claim: shown" in capsys.readouterr().out
    assert "| x: MetaLM above GPT |" in readme.read_text()
    assert "| y: MetaLM above GPT |" not in readme.read_text()
    assert "## y. An invented claim" in (setting.out / "report.md").read_text()


def test_claims_that_were_run_in_other_precisions_are_reported_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Series(arm("n"), "test")
    monkeypatch.setitem(
        CLAIMS,
        "y",
        lambda setting: replace(
            claim(),
            letter="y",
            arms=(alone.arm,),
            comparisons=(Comparison("itself", alone, alone),),
            chance=(),
            curves=(),
        ),
    )
    narrow = Setting(tmp_path, tmp_path / "out", "cpu", 3, "bf16")
    ran(narrow, "x", [0.80, 0.82, 0.81], "a", monkeypatch)
    write_scores(replace(narrow, precision="fp32"), alone, [0.5, 0.6, 0.5])
    monkeypatch.chdir(tmp_path)
    assert tool(monkeypatch, "--only", "x,y", "--report", "--data", tmp_path, "--out", "out") == 0
    assert "in bf16 and fp32" in (narrow.out / "report.md").read_text()
    assert "y: An invented claim: not shown" in capsys.readouterr().out


def test_results_of_another_scale_get_into_no_readme(
    readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting(tmp_path, tmp_path / "out", "cpu", 3)
    ran(setting, "x", [0.80, 0.82, 0.81], "a", monkeypatch)
    readme.write_text("\n".join(markers("gpu")))
    typed = ["--only", "x", "--scale", "gpu", "--data", tmp_path, "--out", setting.out]
    assert tool(monkeypatch, *typed, "--readme", readme, "--report") == EXIT_USAGE
    assert "was made with other settings or pipelines than today's" in capsys.readouterr().err
    assert readme.read_text() == "\n".join(markers("gpu"))
    assert tool(monkeypatch, *typed, "--readme", tmp_path / "absent.md") == EXIT_USAGE
    assert "there is no file" in capsys.readouterr().err
    monkeypatch.setattr("metalm.reproduction.claim.check_data", lambda claims, data: None)
    (tmp_path / "file").touch()
    assert tool(monkeypatch, "--only", "x", "--data", tmp_path, "--out", tmp_path / "file/out") == EXIT_USAGE
    assert "choose another --out" in capsys.readouterr().err
