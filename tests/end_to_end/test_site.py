"""The documentation's site: it builds, its links lead somewhere, its commands can be typed as they stand."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import numpy as np
import pytest
from PIL import Image

from metalm.commands.completion import complete_parser

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))
FIRST_RUN = REPOSITORY / "docs/how_to/first_run.md"
WORDS = [
    "the",
    "fox",
    "saw",
    "a",
    "small",
    "red",
    "bird",
    "near",
    "an",
    "old",
    "mill",
    "over",
    "green",
    "hills",
]


def commands_of(page: Path) -> list[str]:
    """Every line of every bash block."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=250)
    assert found.returncode == 0, found.stderr
    return folder


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_file_and_a_place_in_it(site: Path) -> None:
    count = 0
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            path, anchor = urldefrag(target)
            if "://" in target or target.startswith(("data:", "mailto:")) or page.name == "404.html":
                continue
            there = (page.parent / unquote(path)).resolve() if path else page
            there = there / "index.html" if there.is_dir() else there
            assert there.is_file(), f"{page.relative_to(site)}: {target}"
            if anchor and there.suffix == ".html" and anchor != "__skip":
                assert f'id="{unquote(anchor)}"' in there.read_text(), f"{page.relative_to(site)}: {target}"
            count += 1
    assert count > 500


@pytest.mark.slow
def test_the_reference_has_all_keys_and_all_codes(site: Path) -> None:
    keys = (site / "reference/keys.html").read_text()
    for name in ("model.encoders.NAME.pretrained", "training.schedule", "micro_batch_size", "spike_sigma"):
        assert name in keys
    codes = (site / "reference/exit_codes.html").read_text()
    assert all(f"<td>{code}</td>" in codes for code in (0, 64, 65, 69, 70, 75))


def test_commands_of_all_pages_are_what_their_programs_accept() -> None:
    """Those of `metalm` by its parser; the scripts and templates that others name are there."""
    parser, count = complete_parser(), 0
    for line in [line for page in PAGES for line in commands_of(page)]:
        words = shlex.split(line)
        if "|" in words:
            words = words[words.index("|") + 1 :]
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        if words[0] == "metalm":
            _, rest = parser.parse_known_args([_expanded(word) for word in words[1:]])
            assert all("=" in word and not word.startswith("-") for word in rest), line
            count += 1
        elif words[0] == "python":
            assert (REPOSITORY / words[1]).is_file(), line
        else:
            assert words[0] == "tensorboard", line
    assert count > 40


def _expanded(word: str) -> str:
    return word.replace("*", "x")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_a_newcomer_comes_from_files_to_answers_by_the_first_page_alone(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    with (tmp_path / "texts.jsonl").open("w") as file:
        for _ in range(300):
            file.write(json.dumps({"text": " ".join(draw.choice(WORDS, 40))}) + "\n")
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        colour = tuple(int(value) for value in draw.integers(0, 256, 3))
        Image.new("RGB", (80, 70), colour).save(tmp_path / f"pictures/{number}.png")
        (tmp_path / f"pictures/{number}.txt").write_text(" ".join(draw.choice(WORDS, 6)))
    files = re.findall(r'```yaml title="([^"]+)"\n(.*?)```', FIRST_RUN.read_text(), re.DOTALL)
    for name, content in files:
        (tmp_path / name).write_text(content)
    assert [name for name, _ in files] == ["first.yaml"]

    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert shutil.which("metalm", path=programs)
    printed = {}
    for line in commands_of(FIRST_RUN):
        found = subprocess.run(
            line,
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PATH": programs},
        )
        assert found.returncode == 0, f"{line}\n{found.stdout}\n{found.stderr}"
        printed[line] = found.stdout
    statuses = [line for line in commands_of(FIRST_RUN) if "status" in line]
    assert len(statuses) == 2 and "40 of 40" in printed[statuses[0]]
    assert (tmp_path / "exported/first/model.safetensors").is_file()
