"""Sentences with the mean of twenty people's ratings (Hutto and Gilbert, ICWSM 2014), from four domains.

A rating is from -4 to 4. What is near 0 is left out; the rest is positive or negative. Reviews and articles
are groups; of film snippets and tweets, for which no film or author is given, those that read the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metalm.errors import DataError
from metalm.reproduction.data.archives import read_members, read_tar
from metalm.reproduction.data.packages import VADER
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import connected, normalised, split_by_group

PACKAGES = (VADER,)
DOMAINS = {
    "vader_films": "movieReviewSnippets",
    "vader_products": "amazonReviewSnippets",
    "vader_tweets": "tweets",
    "vader_news": "nytEditorialSnippets",
}
LEAST_RATING = 0.5
"""Nearer to 0, people do not agree on the sign."""


def write(files: dict[str, Path], folder: SetFolder) -> None:
    """Write the four tasks."""
    ((_, inner),) = read_members(files[VADER.name], lambda name: name.endswith("/hutto_ICWSM_2014.tar.gz"))
    found = {
        Path(name).name: content for name, content in read_tar(inner, lambda name: name.endswith(".txt"))
    }
    for task, domain in DOMAINS.items():
        rows = list(_rows(f"{domain}_GroundTruth.txt", found))
        groups = connected([(("source", source), ("text", normalised(text))) for source, _, text in rows])
        records: list[dict[str, Any]] = [
            {
                "id": source,
                "group": f"{task} {rows[group][0]}",
                "text": text,
                "rating": rating,
                "label": "positive" if rating > 0 else "negative",
            }
            for (source, rating, text), group in zip(rows, groups, strict=True)
        ]
        sides = split_by_group(records, lambda record: record["group"])
        folder.write_task(task, sides, label="label")


def _rows(name: str, found: dict[str, bytes]) -> Iterator[tuple[str, float, str]]:
    """Review, article or snippet, its rating, and the text, where it counts as positive or negative."""
    for number, line in enumerate(found[name].decode("utf-8").splitlines(), start=1):
        try:
            source, rating, text = line.split("\t")
            if abs(float(rating)) >= LEAST_RATING and normalised(text):
                yield source.partition("_")[0], float(rating), text.strip()
        except ValueError:
            raise DataError(f"{name}:{number} is not id, rating and text: {line[:80]!r}") from None
