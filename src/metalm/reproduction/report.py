"""The report of a reproduction: `report.md` and `report.html`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from metalm.errors import ConfigError
from metalm.progress import Phase
from metalm.regular_files import replace_file
from metalm.reproduction.arms import Setting
from metalm.reproduction.claim import Series, jobs_of
from metalm.reproduction.data.set_folder import SOURCE_NAME
from metalm.reproduction.intervals import Interval
from metalm.reproduction.jobs import Marks
from metalm.reproduction.pictures import draw_all, draw_claim
from metalm.reproduction.results import ClaimResults, Measured, numbers_of_seeds, precisions
from metalm.reproduction.sections import Block, Picture, Section, Table, as_markdown, as_page

TITLE = "The paper's claims in small"
RULE = (
    "The rule, written before the runs: a comparison is shown if the 95% intervals (t distribution) do "
    "not touch and lie as claimed, contradicted if they lie the other way round, and not shown else. A claim "
    "is shown if all of its comparisons are, contradicted if one is. Each arm's learning rate is chosen on "
    "validation with a seed of its own; an arm on shuffled labels must fall to chance."
)
_CHANCE = {
    "at chance": "has fallen to chance",
    "below chance": "is below chance, so that nothing leaks",
    "above chance": "IS ABOVE CHANCE: something leaks",
    "one seed": "cannot be held against chance by one seed",
}
ALL_NAME = "claims.png"


def write_report(results: Sequence[ClaimResults], setting: Setting, say: Callable[[str], None]) -> None:
    """Write `report.md`, `report.html` and their pictures into the folder of all.

    Raises:
        ConfigError: there are no scores, or matplotlib is not installed.
    """
    results = [one for one in results if one.measured]
    if not results:
        raise ConfigError(f"there are no scores in {setting.out} yet: run the jobs first")
    sections = [Section("Verdicts", (RULE, verdict_table(results)))]
    for one in Phase.over("drawing the results", results, "claims"):
        picture = setting.out / f"claim_{one.claim.letter}.png"
        draw_claim(one, picture)
        sections.append(_section(one, setting, picture))
    sections.append(_circumstances(results, setting))
    draw_all(results, setting.out / ALL_NAME)
    replace_file(setting.out / "report.md", as_markdown(TITLE, sections))
    replace_file(setting.out / "report.html", as_page(TITLE, sections))
    say(f"{setting.out / 'report.md'} and report.html")


def verdict_table(results: Sequence[ClaimResults]) -> Table:
    """A row for each comparison."""
    rows = []
    for one in results:
        judged = {judgement.comparison: judgement.verdict for judgement in one.judged}
        paper = "; ".join(f"{about} {value}" for about, value in one.claim.paper)
        for comparison in one.claim.comparisons:
            rows.append(
                (
                    f"{one.claim.letter}: {comparison.about}",
                    comparison.paper or paper,
                    _score(one, comparison.better),
                    _score(one, comparison.worse),
                    judged.get(comparison, "not done"),
                )
            )
    return Table(("claim", "the paper's figures", "ours", "against", "verdict"), tuple(rows))


def shown(scores: Interval) -> str:
    """A mean with its interval, in percent."""
    if math.isinf(scores.half_width):
        return f"{100 * scores.mean:.1f} (one seed)"
    return f"{100 * scores.mean:.1f} ± {100 * scores.half_width:.1f}"


def _score(results: ClaimResults, series: Series) -> str:
    found = results.measured.get(series)
    return "not done" if found is None else f"{shown(found.scores)} ({series.arm.name}{_part(found)})"


def _part(found: Measured) -> str:
    """Where not all seeds are done, how many are."""
    return "" if found.is_whole else f"; {len(found.by_seed)} of {found.seeds} seeds"


def _section(results: ClaimResults, setting: Setting, picture: Path) -> Section:
    claim = results.claim
    blocks: list[Block] = [
        f"The paper: {claim.says}",
        f"Here: {claim.how}",
        f"Verdict: {results.verdict}.",
        Table(("the paper's", "figure"), claim.paper),
        Table(
            (
                "arm",
                "what it is",
                f"{claim.metric}, %",
                "by seed",
                "questions asked",
                "learning rate",
                "examples seen",
            ),
            tuple(_rows(results)),
        ),
        Picture(picture, f"scores and learning curves of claim {claim.letter}"),
    ]
    for check, found in results.at_chance.items():
        blocks.append(f"{check.series.arm.about}: {_CHANCE[found]} ({100 * check.chance:.1f}%).")
    if results.verdict in ("not shown", "contradicted") and claim.tried:
        blocks.append(f"What was tried: {claim.tried}")
    blocks += [f"Data: {_source(setting, name)}" for name in claim.sets]
    return Section(f"{claim.letter}. {claim.title}", tuple(blocks))


def _rows(results: ClaimResults) -> Iterator[tuple[str, ...]]:
    for series in results.claim.series():
        found = results.measured.get(series)
        if found is None:
            yield (series.key, series.arm.about, "not done", "", "", "", "")
            continue
        facts = results.figures.arms.get(series.arm.name)
        yield (
            series.key,
            series.arm.about,
            shown(found.scores),
            ", ".join(f"{100 * value:.1f}" for value in found.by_seed.values()) + _part(found),
            f"{found.questions:,}",
            f"{facts.rate:g}" if facts else "",
            f"{facts.examples:,} in {facts.tokens:,} tokens" if facts else "",
        )


def _source(setting: Setting, name: str) -> str:
    path = setting.data / name / SOURCE_NAME
    if not path.is_file():
        return f"{name} (no {SOURCE_NAME})"
    packages = json.loads(path.read_text()).get("packages", [])
    told = [
        f"{one['package']} {one['version']}, {one['licence']}, sha256 {one['sha256']}" for one in packages
    ]
    return f"{name}: {'; '.join(told)}"


def _circumstances(results: Sequence[ClaimResults], setting: Setting) -> Section:
    jobs, marks = jobs_of((one.claim, setting) for one in results), Marks(setting.out)
    done = [(job, found) for job in jobs if (found := marks.read(job)) is not None]
    total = sum(found.seconds for _, found in done)
    rows = tuple((job.name, f"{found.seconds / 60:.1f}") for job, found in done)
    commits = sorted({found.commit or "unknown" for _, found in done})
    machines = sorted({found.machine for _, found in done})
    trained_in = " and ".join(precisions([found for _, found in done])) or "no precision yet"
    return Section(
        "Where and how long",
        (
            f"Commit {', '.join(commits)}; {'; '.join(machines)}.",
            f"Scale {setting.scale}, in {trained_in}, {numbers_of_seeds(results)}.",
            f"{len(done)} of {len(jobs)} jobs are done, in {total / 60:.0f} minutes of wall time "
            "in all, each since its last start.",
            Table(("job", "minutes"), rows),
        ),
    )
