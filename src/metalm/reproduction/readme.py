"""The results that a README shows: a table, and a picture and figures beside it.

Figures are kept as JSON, with the scores of each seed, so that claims can be run one at a time, and again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from metalm.errors import ConfigError
from metalm.regular_files import replace_file
from metalm.reproduction.arms import Setting
from metalm.reproduction.claim import Claim
from metalm.reproduction.pictures import draw_all
from metalm.reproduction.report import verdict_table
from metalm.reproduction.results import ClaimResults, Figures, numbers_of_seeds
from metalm.reproduction.sections import markdown_table
from metalm.reproduction.this_machine import Scale

MEASURED = "tools/measured/reproduction_{scale}"
"""The picture (.png) and the figures (.json), as seen from the README."""

_LETTER = re.compile(r"^\| (\w): ", re.MULTILINE)
"""Of a claim, in its rows."""
_FORM = TypeAdapter(dict[str, Figures])
"""By letter of the claim."""


def write_into(
    readme: Path,
    results: Sequence[ClaimResults],
    setting: Setting,
    claims: Mapping[str, Callable[[Setting], Claim]],
) -> None:
    """Put the claims that are whole into a README's table, its picture and its figures; others stay.

    Args:
        claims: all that there are, by letter.

    Raises:
        ConfigError: no claim is whole; the README has no place for the table, or claims in it of which there
            are no figures; or what is kept beside it holds something else, as of a claim that has changed.
    """
    measured = MEASURED.format(scale=setting.scale)
    picture, kept_at = (readme.parent / f"{measured}{suffix}" for suffix in (".png", ".json"))
    kept = _read(kept_at)
    kept |= {one.claim.letter: one.figures for one in results if one.verdict != "not done"}
    if not kept:
        raise ConfigError(f"no claim in {setting.out} is whole yet: run its jobs first")
    together = [
        ClaimResults(claim(setting), kept[letter]) for letter, claim in claims.items() if letter in kept
    ]
    if changed := [one.claim.letter for one in together if one.verdict == "not done"]:
        raise ConfigError(
            f"{kept_at} has no figures of today's claim {', '.join(changed)}: run and report it again, or "
            "take it out there"
        )
    content = written_into(readme.read_text(), together, setting.scale, f"{measured}.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_all(together, picture)
    replace_file(kept_at, _FORM.dump_json(dict(sorted(kept.items())), indent=1).decode() + "\n")
    replace_file(readme, content)


def markers(scale: Scale) -> tuple[str, str]:
    """The lines that a README's table of a scale stands between."""
    return f"<!-- reproduction, {scale}: begin -->", f"<!-- reproduction, {scale}: end -->"


def written_into(readme: str, results: Sequence[ClaimResults], scale: Scale, picture: str) -> str:
    """A README whose part between the markers of a scale is the table of these results.

    Args:
        picture: where the picture of all claims is, as seen from the README.

    Raises:
        ConfigError: the markers are not there, or between them are claims that are not among the results.
    """
    begin, end = markers(scale)
    before, found, rest = readme.partition(begin)
    inside, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(
            f"expected the lines {begin} and {end} in the README: put them where the table goes"
        )
    if lost := set(_LETTER.findall(inside)) - {one.claim.letter for one in results}:
        raise ConfigError(
            f"the README's table has claim {', '.join(sorted(lost))}, of which no figures are kept: report "
            "it, too, or take its rows out"
        )
    lines = [
        "",
        *markdown_table(verdict_table(results)),
        "",
        f"{numbers_of_seeds(results)} at scale `{scale}`, in {_precisions(results)}; "
        f"{_machines(results)}; commit {_commits(results)}. Minutes of jobs, one after another: "
        f"{', '.join(f'{one.claim.letter} {one.figures.minutes:.0f}' for one in results)}.",
        "",
        f"![scores with their intervals]({picture})",
        "",
    ]
    return before + begin + "\n".join(lines) + end + after


def _read(path: Path) -> dict[str, Figures]:
    try:
        return _FORM.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(
            f"{path} does not hold figures of claims ({where}: {first['msg']}): restore it, or delete it and "
            "report all claims again"
        ) from None


def _commits(results: Sequence[ClaimResults]) -> str:
    return _of_claims(results, lambda figures: {origin.commit[:12] for origin in figures.origins})


def _precisions(results: Sequence[ClaimResults]) -> str:
    return _of_claims(results, lambda figures: figures.precisions)


def _of_claims(results: Sequence[ClaimResults], told: Callable[[Figures], Collection[str]]) -> str:
    """What their figures tell, and of which claims, where they differ."""
    letters: dict[str, list[str]] = {}
    for one in results:
        for word in sorted(told(one.figures)):
            letters.setdefault(word, []).append(one.claim.letter)
    if len(letters) > 1:
        return ", ".join(f"{word} ({', '.join(claims)})" for word, claims in letters.items())
    return next(iter(letters), "unknown")


def _machines(results: Sequence[ClaimResults]) -> str:
    return "; ".join(sorted({origin.machine for one in results for origin in one.figures.origins}))
