"""`metalm report`: a page of a run, complete in itself, as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from metalm import cli
from metalm.config import load_config, write_config
from metalm.errors import ConfigError
from metalm.operations.report import write_report
from metalm.run_ends import record_end
from permissions import as_users_are

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that failed once, with a caption that would be a script."""
    folder = tmp_path / "first"
    (folder / "logs").mkdir(parents=True)
    config = {
        "parallel": {"tensor": 2},
        "training": {"steps": 40, "global_batch_size": 8},
        "provenance": {"commit": "abc123", "versions": {"torch": "2.13.0"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "logs/metrics.jsonl").open("w") as file:
        for step in range(1, 41):
            speed = {
                f"speed/{name}": 1.0 for name in ("tokens_per_second", "step_seconds", "data_wait_share")
            }
            line = {"step": step, "time": 1e9 + step, "loss/all": 7.0 - step / 10, "loss/text": 6.5, **speed}
            file.write(json.dumps(line | ({"held_out/text": 5.0} if step % 20 == 0 else {})) + "\n")
        file.write('{"step": 41, "ti')
    record_end(folder, 20, 70, "the loss is <b>not</b> finite")
    record_end(folder, 40, 0, "done")
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_image("scenes/0", np.full((3, 8, 8), 200, np.uint8), 40)
        writer.add_text("captions/scenes", "generated: <script>alert(1)</script>", 40)
    return folder


def test_the_page_holds_result_curves_samples_layout_faults_and_versions(run: Path) -> None:
    page = write_report(run).read_text()
    assert page.count("<svg") == 3  # loss, held out, speed
    assert re.search(r"<th>step</th><td>40 of 40", page) and "<th>parallel.tensor</th><td>2</td>" in page
    assert "ended with 70" in page and "the loss is &lt;b&gt;not&lt;/b&gt; finite" in page
    assert "abc123" in page and "2.13.0" in page and page.count("data:image/png;base64,") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


@pytest.mark.parametrize(("pipeline", "count"), [("demo", 2), ("pretrain_text_encoder_tiny", 0)])
def test_losses_are_shown_in_the_unit_of_the_objective(
    run: Path, pipeline: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matplotlib draws letters as paths, behind the text as a comment. That of replaced tokens has none."""
    monkeypatch.chdir(REPOSITORY)
    write_config(load_config(Path(f"pipelines/{pipeline}.yaml")), run / "config.yaml", {})
    page = write_report(run).read_text()
    assert page.count("<!-- nats per token -->") == page.count("<!-- nats ") == count


def test_the_page_holds_no_secrets_of_the_config(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    url = "https://user:hunter2@bucket.example/pile/{shard}?X-Amz-Signature=SIGNED"
    config["data"] = {"sources": {"pile": {"url": url}, "odd": None}, "evaluation": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = write_report(run).read_text()
    assert "bucket.example/pile/{shard}" in page
    assert "hunter2" not in page and "SIGNED" not in page


def test_a_run_that_has_barely_begun_has_a_page_too(tmp_path: Path, run: Path) -> None:
    for name in ("tensorboard", "logs"):
        shutil.rmtree(run / name)
    page = write_report(run, tmp_path / "page.html").read_text()
    assert "Layout" in page and "Curves" not in page and "Samples" not in page
    with pytest.raises(ConfigError, match="is no run folder"):
        write_report(tmp_path / "nowhere")


def test_a_browser_shows_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    monkeypatch.setattr("sys.argv", ["metalm", "report", str(run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    with sync_playwright() as playwright:
        shown = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = shown.new_page(viewport={"width": 1200, "height": 900})
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.goto((run / "report.html").as_uri())
        titles = page.locator("h2").all_inner_texts()
        assert titles == ["Result", "Curves", "Samples", "Layout", "Starts and ends", "Versions", "Config"]
        first = page.locator("svg").first.bounding_box()
        assert first is not None and first["width"] > 400 and first["height"] > 150
        assert page.locator("img").evaluate("image => image.naturalWidth") == 8
        assert not problems
        shown.close()


def test_a_page_that_cannot_be_written_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(run)
    advice = "; name a file in a folder that you may write with --out"
    for out, cause in (
        (tmp_path / "absent/page.html", f"there is no folder {tmp_path}/absent"),
        (tmp_path, "it is a folder"),
        (Path(), "it is a folder"),
        (run / "config.yaml/page.html", "Not a directory"),
    ):
        with pytest.raises(ConfigError, match=f"cannot be written: {cause}{advice}"):
            write_report(run, out)
    run.chmod(0o500)
    with as_users_are(), pytest.raises(ConfigError, match=f"cannot be written: Permission denied{advice}"):
        write_report(run)
    run.chmod(0o700)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_page_of_the_folder_one_is_in_has_the_runs_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    page = write_report(Path()).read_text()
    assert "<title>first: a run of MetaLM</title>" in page and "<h1>first</h1>" in page
