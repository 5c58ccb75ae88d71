"""What an operator sees in TensorBoard, in a real browser, of a run that was started three times."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from distributed.ranks import Ranks, run_program, wait_until
from metalm.run_metrics import read_metrics
from metalm.training.monitor.dashboard import PAGE

REPOSITORY = Path(__file__).parents[2]
RUN = "watched/tensorboard"
CURVE = (255, 112, 67)
"""TensorBoard's first colour of a run."""
TIMEOUT_MS = 60_000


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss/all"] for entry in read_metrics(run) if "loss/all" in entry}


def wait_for_step(run: Path, step: int, ranks: Ranks) -> None:
    reached = wait_until(lambda: max(losses(run), default=0) >= step, ranks, timeout_s=150)
    assert reached, f"the run does not come forward:\n{ranks.output()}"


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved each fourth step, stopped by its file early, killed some steps after a checkpoint, then done."""
    runs = tmp_path_factory.mktemp("board")
    command = ["-m", "metalm", "train", str(tiny_data / "tiny.yaml"), f"run.folder={runs}"]
    slow = [*command, "run.name=watched", "training.steps=100000", "monitor.sample_every_steps=2"]
    run = runs / "watched"
    for how in ("stopped", "killed"):
        ranks = Ranks(slow)
        if how == "stopped":
            wait_for_step(run, 2, ranks)
            (run / "stop").touch()
        else:
            saved = int((run / "checkpoints/latest").read_text().strip().removeprefix("step_"))
            wait_for_step(run, (saved // 4 + 1) * 4 + 2, ranks)
            ranks.kill(0)
        assert ranks.wait(timeout_s=100) == [{"stopped": 75, "killed": -signal.SIGKILL}[how]], ranks.output()
    saved = int((run / "checkpoints/latest").read_text().strip().removeprefix("step_"))
    assert saved < max(losses(run)), "nothing is superseded"
    last = [*command, "run.name=watched", f"training.steps={max(losses(run)) + 4}"]
    code, output = run_program(
        [*last, "monitor.sample_every_steps=2", "monitor.peak_tflops=1"], timeout_s=150
    )
    assert code == 0, output
    return run


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast loader", "plain loader"])
def board(run: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a TensorBoard on this machine that has read the run."""
    with serve(run, request.param) as address:
        yield address


@contextmanager
def serve(run: Path, load_fast: str) -> Iterator[str]:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.parent), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", "0", f"--load_fast={load_fast}"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        address = next(
            word for line in process.stderr for word in line.split() if word.startswith("http://127.0.0.1")
        ).rstrip("/")
        deadline = time.monotonic() + 60
        while not fetch(f"{address}/data/runs") or not fetch(f"{address}/data/plugin/scalars/tags"):
            assert time.monotonic() < deadline, "TensorBoard does not read the run"
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def fetch(address: str, **query: str | int) -> Any:
    with urllib.request.urlopen(f"{address}?{urlencode(query)}" if query else address, timeout=30) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[Any]:
    """A page of a headless browser, and the address of a TensorBoard."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = find_browser()
    if browser is None:
        pytest.skip("no browser: install Debian's package chromium")
    with serve(run, "false") as address, playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1500, "height": 2400}, base_url=address)
        page.set_default_timeout(TIMEOUT_MS)
        yield page
        chromium.close()


def open_tab(page: Any, name: str) -> None:
    page.goto("about:blank")  # a change of the fragment alone loads nothing
    page.goto(f"/#{name}")


def open_text(page: Any, section: str, tag: str) -> str:
    """All that the Text tab shows under a tag, the newest first."""
    open_tab(page, "text")
    loader = page.locator("tf-text-loader").filter(
        has=page.get_by_text(f"tag: {tag}/text_summary", exact=True)
    )
    heading = page.locator("button.heading").filter(has=page.get_by_text(section, exact=True))
    heading.wait_for()
    if not loader.count():  # TensorBoard opens the first sections only
        heading.click()
    loader.locator("code").first.wait_for()
    return "\n".join(loader.locator("code").all_inner_texts())


def test_a_run_started_three_times_is_one_curve(run: Path, board: str) -> None:
    expected = losses(run)
    assert sorted(expected) == list(range(1, max(expected) + 1))
    points = fetch(f"{board}/data/plugin/scalars/scalars", run=RUN, tag="loss/all")
    assert [step for _, step, _ in points] == sorted(expected)
    assert [value for _, _, value in points] == pytest.approx(list(expected.values()), rel=1e-6)
    restarts = fetch(f"{board}/data/plugin/scalars/scalars", run=RUN, tag="run/restarts")
    counts = [int(value) for _, _, value in restarts]
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2}


def test_a_run_is_one_record_of_key_values(board: str) -> None:
    request = urllib.request.Request(
        f"{board}/data/plugin/hparams/session_groups",
        data=json.dumps(
            {"startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_UNKNOWN"], "colParams": []}
        ).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        (group,) = json.loads(answer.read())["sessionGroups"]
    assert [session["name"] for session in group["sessions"]] == [RUN]
    assert group["hparams"]["training.optimizer.learning_rate"] == pytest.approx(1e-3)
    assert group["hparams"]["model.decoder.num_layers"] == 2


def test_the_page_for_operators_shows_every_chart(page: Any, tmp_path: Path) -> None:
    open_tab(page, "custom_scalars")
    for section, charts in PAGE.items():
        page.get_by_text(section, exact=True).wait_for()
        for title in charts:
            heading = page.get_by_text(title, exact=True)
            card = page.locator("tf-custom-scalar-multi-line-chart-card").filter(has=heading)
            card.get_by_text(re.compile(r"Matches \([1-9]")).wait_for()
            deadline = time.monotonic() + 30
            while not curve_pixels(card.screenshot(path=tmp_path / "chart.png")):
                assert time.monotonic() < deadline, f"no curve in {title}: {tmp_path}/chart.png"
                time.sleep(0.2)
    page.screenshot(path=tmp_path / "page.png")


def curve_pixels(png: bytes) -> bool:
    """Whether a picture of a chart has a curve in it."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((abs(pixels - CURVE).max(axis=2) < 16).sum()) > 20


def test_captions_stand_beside_their_images_and_as_text(page: Any, run: Path, tiny_data: Path) -> None:
    command = ["-m", "metalm", "evaluate", str(tiny_data / "tiny.yaml"), "--samples", "2"]
    code, output = run_program([*command, f"run.folder={run.parent}", "run.name=watched"], timeout_s=150)
    assert code == 0, output
    samples = [json.loads(line) for line in (run / "samples_scenes.jsonl").read_text().splitlines()]
    shown = open_text(page, "captions", "captions/scenes").split()
    said = [
        f"image {i} generated: {s['generated']} reference: {s['reference']}" for i, s in enumerate(samples)
    ]
    assert " ".join(" ".join(said).split()) in " ".join(shown)
    open_tab(page, "images")
    for tag in ("mask/decoder", "mask/text", "mask/image", "scenes/0", "scenes/1"):
        image = page.locator("tf-image-loader", has_text=tag).locator("img").first
        image.wait_for()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") >= 12


def test_config_and_layout_are_there_as_text(page: Any) -> None:
    assert "learning_rate: 0.001" in open_text(page, "config", "config")
    assert "tensor 1 x data 1" in open_text(page, "plan", "plan")
    starts = open_text(page, "start", "start")
    assert [int(n) for n in re.findall(r"restarts +(\d)", starts)] == [2, 1, 0]
    open_tab(page, "hparams")
    page.get_by_text("training.optimizer.learning_rate").first.wait_for()


def test_grafana_asks_for_figures_that_a_run_has(run: Path) -> None:
    """Its dashboard names families and names as the Prometheus sink writes them of such figures."""
    figures = {name for entry in read_metrics(run) for name in entry if "/" in name}
    families = {name.partition("/")[0] for name in figures} | {"step", "written_time_seconds"}
    dashboard = json.loads((REPOSITORY / "slurm/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 8
    for query in queries:
        family = re.search(r"metalm_(\w+)\{", query)
        assert family is not None and family[1] in families, query
        if name := re.search(r'name="(\w+)"', query):
            assert f"{family[1]}/{name[1]}" in figures, query
