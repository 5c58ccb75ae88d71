"""METEOR and SPICE of captions, through the jars of their authors where the user has them.

Nothing here approximates either: without its jar a metric is refused. The words are those of the other
caption metrics, as in COCO's evaluation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metalm.errors import ConfigError, DataError
from metalm.tasks.metrics.metric import Answered, Metric, mean_of
from metalm.tasks.metrics.treebank import caption_words

METEOR_JAR = "METALM_METEOR_JAR"
SPICE_JAR = "METALM_SPICE_JAR"

_NUM_COUNTS = 23
_CHUNKS, _PREDICTION_MATCHES, _REFERENCE_MATCHES = 20, 21, 22
"""Columns of METEOR 1.5's counts, of which the first two are the lengths of prediction and reference."""


def _java(metric: str, variable: str, memory: str) -> list[str]:
    """The command that runs the jar which the environment variable names.

    Raises:
        ConfigError: the variable is not set or names no file, or Java is not there.
    """
    jar = os.environ.get(variable)
    if not jar:
        raise ConfigError(
            f"{metric} is computed by its authors' jar, which is not part of MetaLM: set {variable} to the "
            "jar's path, or leave the metric out"
        )
    if not Path(jar).is_file():
        raise ConfigError(
            f"{metric}: {variable} names {jar}, which is not a file; set it to the path of the jar"
        )
    java = shutil.which("java")
    if java is None:
        raise ConfigError(f"{metric} needs Java to run {jar}: no program `java` is on PATH")
    return [java, f"-Xmx{memory}", "-Dfile.encoding=UTF-8", "-jar", str(Path(jar).resolve())]


def _meteor_java() -> list[str]:
    return _java("meteor", METEOR_JAR, "2G")


def _spice_java() -> list[str]:
    return _java("spice", SPICE_JAR, "8G")


def _run(metric: str, command: list[str], lines: str) -> str:
    """What the command writes when it reads `lines`, run in the jar's folder, where its data are.

    Raises:
        DataError: the command failed.
    """
    folder = Path(command[command.index("-jar") + 1]).parent
    done = subprocess.run(
        command, input=lines, capture_output=True, encoding="utf-8", cwd=folder, check=False
    )
    if done.returncode:
        raise DataError(
            f"{metric}: {' '.join(command)} ended with {done.returncode}: {done.stderr[-1000:].strip()}"
        )
    return done.stdout


def _caption(text: str) -> str:
    return " ".join(caption_words(text))


def _meteor(requests: Sequence[str], answers_each: int, numbers_each: int) -> np.ndarray:
    """METEOR's answers to requests of a line each: [requests, answers_each, numbers_each].

    Raises:
        ConfigError: there is no jar.
        DataError: the jar failed, or answered otherwise.
    """
    command = [*_meteor_java(), "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = _run("meteor", command, "".join(request + "\n" for request in requests)).splitlines()
    jar = os.environ[METEOR_JAR]
    expected = len(requests) * answers_each
    if len(lines) != expected:
        raise DataError(f"meteor: expected {expected} lines from {jar}, got {len(lines)}; is it METEOR 1.5?")
    try:
        numbers = np.array([line.split() for line in lines], np.float64)
        return numbers.reshape(len(requests), answers_each, numbers_each)
    except ValueError:
        raise DataError(
            f"meteor: expected lines of {numbers_each} numbers from {jar}, got {lines[0][:200]!r}; "
            "is it METEOR 1.5?"
        ) from None


def _meteor_statistics(answered: Sequence[Answered]) -> np.ndarray:
    """METEOR's 23 counts for each caption and its best reference."""
    requests = [
        " ||| ".join(["SCORE", *map(_caption, example.references), _caption(example.prediction)])
        for example in answered
    ]
    counts = _meteor(requests, answers_each=1, numbers_each=_NUM_COUNTS)[:, 0]
    # METEOR's own sum over captions leaves out the one chunk of a caption that is its reference.
    whole = (counts[:, [_PREDICTION_MATCHES, _REFERENCE_MATCHES]] == counts[:, :2]).all(axis=1)
    counts[whole & (counts[:, _CHUNKS] == 1), _CHUNKS] = 0
    return counts


def _meteor_value(sums: np.ndarray) -> np.ndarray:
    """METEOR of summed counts: of a set of one sum the jar gives the score of the sum, then of the set."""
    requests = [f"EVAL ||| {' '.join(map(str, counts.tolist()))}" for counts in sums]
    return _meteor(requests, answers_each=2, numbers_each=1)[:, 1, 0]


def _spice(answered: Sequence[Answered]) -> list[float]:
    """F of each caption's scene graph; NaN where the jar gives none."""
    command = _spice_java()
    captions = [
        {
            "image_id": position,
            "test": _caption(example.prediction),
            "refs": [_caption(reference) for reference in example.references],
        }
        for position, example in enumerate(answered)
    ]
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "captions.json"), Path(folder, "scores.json")
        given.write_text(json.dumps(captions), encoding="utf-8")
        _run("spice", [*command, str(given), "-out", str(found), "-subset", "-silent"], "")
        if not found.exists():
            raise DataError(f"spice: {command[-1]} ended without writing the scores")
        scores = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(found.read_text())}
    if missing := len(captions) - len(scores):
        raise DataError(f"spice: {command[-1]} left {missing} of {len(captions)} captions without a score")
    return [
        float("nan") if scores[position] is None else float(scores[position])
        for position in range(len(captions))
    ]


JARS = [
    Metric("meteor", _meteor_statistics, _meteor_value, require=_meteor_java),
    mean_of("spice", _spice, require=_spice_java),
]
