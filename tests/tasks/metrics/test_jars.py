"""METEOR and SPICE through the user's jars: what is sent to them, and what is made of their answers.

Java and the jars are stood in for by a small program named `java`. For METEOR it replays lines that were
recorded once from meteor-1.5.jar and knows no others; for SPICE it writes a file of scores in the form that
spice-1.0.jar has.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from metalm.errors import ConfigError, DataError
from metalm.tasks.metrics import METRICS, Answered

CAPTIONS = [
    Answered("A dog is running on grass.", ("A dog runs on the grass.", "The dog is running!")),
    Answered("a cat sleeps", ("two men play ball", "men playing")),
    Answered("A man rides a bike", ("A man rides a bike.",)),
    Answered("", ("A woman's umbrella",)),
]
ZEROS = " 0.0" * 12
RECORDED = {
    "SCORE ||| a dog runs on the grass ||| the dog is running ||| a dog is running on grass": [
        f"6.0 4.0 3.0 2.0 2.0 2.0 1.0 1.0{ZEROS} 1.0 3.0 3.0"
    ],
    "SCORE ||| two men play ball ||| men playing ||| a cat sleeps": [
        f"3.0 4.0 1.0 1.0 0.0 0.0 0.0 0.0{ZEROS} 0.0 0.0 0.0"
    ],
    "SCORE ||| a man rides a bike ||| a man rides a bike": [
        f"5.0 5.0 2.0 2.0 3.0 3.0 2.0 2.0{ZEROS} 1.0 5.0 5.0"
    ],
    "SCORE ||| a woman 's umbrella ||| ": [f"0.0 5.0 0.0 3.0 0.0 0.0 0.0 0.0{ZEROS} 0.0 0.0 0.0"],
    # The four by themselves have this score together as well.
    f"EVAL ||| 14.0 18.0 6.0 8.0 5.0 5.0 3.0 3.0{ZEROS} 1.0 8.0 8.0": ["0.2955069913539775"] * 2,
}
METEOR_JAVA = """
import json, pathlib, sys
options = ["-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
assert sys.argv[1:] == options
recorded = json.loads(pathlib.Path("recorded.json").read_text())
for line in sys.stdin:
    print(*recorded[line.removesuffix("\\n")], sep="\\n")
"""
SPICE_JAVA = """
import json, sys
assert sys.argv[1:5] == ["-Xmx8G", "-Dfile.encoding=UTF-8", "-jar", JAR]
given, out, found, *rest = sys.argv[5:]
assert (out, rest) == ("-out", ["-subset", "-silent"])
scores = [None if not one["test"] else 1 / len(one["refs"]) for one in json.load(open(given))]
items = [{"image_id": at, "scores": {"All": {"pr": 0, "re": 0, "f": f}}} for at, f in enumerate(scores)]
json.dump(items[::-1], open(found, "w"))
"""


def _stand_in(folder: Path, variable: str, program: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A jar, and a `java` on PATH that is `program`."""
    jar = folder / "metric.jar"
    jar.touch()
    java = folder / "java"
    java.write_text(f"#!{sys.executable}\nJAR = {str(jar)!r}\n{program}")
    java.chmod(0o755)
    (folder / "recorded.json").write_text(json.dumps(RECORDED))
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv(variable, str(jar))
    return jar


def test_meteor_is_that_of_the_jar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(tmp_path, "METALM_METEOR_JAR", METEOR_JAVA, monkeypatch)
    assert METRICS["meteor"].score(CAPTIONS) == 0.2955069913539775


def test_spice_is_the_mean_of_the_jars_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(tmp_path, "METALM_SPICE_JAR", SPICE_JAVA, monkeypatch)
    assert METRICS["spice"].score(CAPTIONS[:3]) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert math.isnan(METRICS["spice"].score(CAPTIONS))


@pytest.mark.parametrize("name", ["meteor", "spice"])
def test_without_its_jar_a_metric_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"METALM_{name.upper()}_JAR"
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match=f"{name} is computed by its authors' jar.*set {variable}"):
        METRICS[name].score(CAPTIONS)
    with pytest.raises(ConfigError, match=f"set {variable}"):
        METRICS[name].require()
    monkeypatch.setenv(variable, str(tmp_path / "nowhere.jar"))
    with pytest.raises(ConfigError, match=f"{name}: {variable} names .*nowhere.jar, which is not a file"):
        METRICS[name].score(CAPTIONS)
    (tmp_path / "nowhere.jar").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{name} needs Java.*no program `java` is on PATH"):
        METRICS[name].score(CAPTIONS)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('Invalid or corrupt jarfile')", "ended with 1: Invalid or corrupt jarfile"),
        (
            "print('help\\n' * 4, end='')",
            "expected lines of 23 numbers from .*metric.jar, got 'help'; is it METEOR 1.5",
        ),
        ("print('1.0 2.0\\n' * 4, end='')", "expected lines of 23 numbers from .*metric.jar, got '1.0 2.0'"),
        ("print('1.0 2.0')", "expected 4 lines .* got 1; is it METEOR 1.5"),
        ("", "expected 4 lines .* got 0"),
    ],
)
def test_a_jar_that_answers_otherwise_is_named(
    program: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(tmp_path, "METALM_METEOR_JAR", f"import sys; sys.stdin.read()\n{program}", monkeypatch)
    with pytest.raises(DataError, match=f"meteor: .*{message}"):
        METRICS["meteor"].score(CAPTIONS)


def test_spice_without_all_scores_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(tmp_path, "METALM_SPICE_JAR", "", monkeypatch)
    with pytest.raises(DataError, match=r"spice: .*metric.jar ended without writing the scores"):
        METRICS["spice"].score(CAPTIONS)
    _stand_in(tmp_path, "METALM_SPICE_JAR", SPICE_JAVA.replace("items[::-1]", "items[:1]"), monkeypatch)
    with pytest.raises(DataError, match=r"spice: .*metric.jar left 3 of 4 captions without a score"):
        METRICS["spice"].score(CAPTIONS)
