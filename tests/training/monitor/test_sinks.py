"""What sinks show, read back by the libraries of those who show it, and what happens when they cannot."""

from __future__ import annotations

import importlib.util
import logging
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from metalm.config import RunConfig, load_config
from metalm.config.secrets import without_secrets
from metalm.errors import ConfigError
from metalm.run_metrics import read_metrics
from metalm.training.dry_run import print_plan
from metalm.training.monitor.json_lines import JsonLines
from metalm.training.monitor.sink import About, Sink
from metalm.training.monitor.sinks import AllSinks, check_sinks, open_sinks
from metalm.training.monitor.terminal import Terminal

REPOSITORY = Path(__file__).parents[3]
FIGURES = {
    "loss/all": 2.5,
    "loss/text": 2.25,
    "optimizer/learning_rate": 1e-3,
    "optimizer/gradient_norm": 0.5,
    "speed/tokens_per_second": 1000.0,
    "speed/data_wait_share": 0.25,
    "data/text/skipped/undecodable_image": 3,
}
PASSWORD = "hunter2"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tmp_path / "run"


@pytest.fixture
def make_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*overrides: str) -> RunConfig:
        monkeypatch.chdir(REPOSITORY)
        return load_config(REPOSITORY / "pipelines/demo.yaml", overrides)

    return make


def show(config: RunConfig, run_folder: Path) -> None:
    sinks = open_sinks(config, run_folder, restarts=0)
    sinks.begin(0)
    sinks.write_text(0, "config", "name: <demo>\nsteps: 3")
    sinks.write(7, FIGURES, About.STEPS)
    sinks.write(7, {"held_out/text": 2.75}, About.HELD_OUT)
    sinks.write_picture(7, "mask/decoder", np.zeros((8, 8, 3), np.uint8))
    sinks.close()


def test_the_terminal_has_a_line_for_steps_and_for_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(total_steps=10)
    terminal.begin(1)
    terminal.write(7, FIGURES, About.STEPS)
    terminal.write(7, {"time/apart/save": 1.0}, About.APART)
    terminal.write(7, {"held_out/text": 2.75}, About.HELD_OUT)
    steps, held_out = capsys.readouterr().out.splitlines()
    assert steps.startswith("step 7/10  loss 2.5000 (text 2.250)  rate 1.00e-03  norm 0.50  1000 tokens/s")
    assert "data wait 25%" in steps
    assert held_out == "held out at step 7: text 2.7500"


def test_prometheus_reads_every_figure_from_the_text_file(make_config: Any, run_folder: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    show(make_config("monitor.sinks.prometheus={}", "run.name=watched"), run_folder)
    text = (run_folder / "logs/metalm_watched.prom").read_text()
    found = {
        (sample.name, sample.labels.get("name"), sample.labels["run"]): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    for name, value in {**FIGURES, "held_out/text": 2.75}.items():
        family, _, rest = name.partition("/")
        assert found[f"metalm_{family}", rest, "watched"] == value
    assert found["metalm_step", None, "watched"] == 7
    assert [p.name for p in (run_folder / "logs").glob("*.prom*")] == ["metalm_watched.prom"]


def test_a_folder_that_cannot_be_written_stops_no_run(
    make_config: Any, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    show(make_config(f"monitor.sinks.prometheus.folder={run_folder}/gone"), run_folder)
    assert caplog.text.count("figures cannot be written") == 1
    assert read_metrics(run_folder)[1]["loss/all"] == 2.5


def test_a_sink_that_fails_is_opened_again_and_the_others_show_on(
    run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Sink):
        def __init__(self) -> None:
            self.calls: list[str] = []
            self.is_full = True

        def reopen(self) -> None:
            self.calls.append("reopen")

        def write(self, step: int, figures: Mapping[str, float], about: About) -> None:
            self.calls.append(f"write {step}")
            if self.is_full:
                raise OSError("No space left on device")

    full = Full()
    sinks = AllSinks([full, JsonLines(run_folder, restarts=0)])
    sinks.begin(0)
    for step in (1, 2):
        sinks.write(step, {"loss/all": 1.0}, About.STEPS)
    full.is_full = False
    for step in (3, 4):
        sinks.write(step, {"loss/all": 1.0}, About.STEPS)
    assert full.calls == ["write 1", "reopen", "write 2", "reopen", "write 3", "write 4"]
    assert [entry["step"] for entry in read_metrics(run_folder) if "loss/all" in entry] == [1, 2, 3, 4]
    assert caplog.text.count("No space left on device") == 1


def test_what_could_not_be_superseded_is_before_anything_else_is_shown(
    run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = AllSinks([JsonLines(run_folder, restarts=0)])
    sinks.begin(0)
    for step in (1, 2, 3):
        sinks.write(step, {"loss/all": 1.0}, About.STEPS)
    in_the_way = run_folder / "logs" / "metrics.jsonl.partial"
    in_the_way.mkdir()
    sinks.begin(2)
    sinks.write(2, {"loss/all": 4.0}, About.STEPS)
    assert "figures cannot be written" in caplog.text
    in_the_way.rmdir()
    sinks.write(2, {"loss/all": 5.0}, About.STEPS)
    shown = [(entry["step"], entry["loss/all"]) for entry in read_metrics(run_folder) if "loss/all" in entry]
    assert shown == [(1, 1.0), (2, 5.0)]


@pytest.mark.parametrize("sink", ["wandb", "prometheus"])
def test_a_sink_without_its_package_is_refused_with_the_extra(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, sink: str
) -> None:
    config = make_config(f"monitor.sinks.{sink}={{}}")
    monkeypatch.setattr("metalm.training.monitor.sinks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"monitor\.sinks\.{sink} .* pip install 'metalm\[{sink}\]'"):
        check_sinks(config)
    check_sinks(make_config())


def test_only_the_place_is_left_of_an_address(make_config: Any) -> None:
    config = make_config(
        f"data.sources.text.url=https://me:{PASSWORD}@host:8080/pile/{{shard}}?signature={PASSWORD}",
        f"data.sources.scenes.url=pipe:TOKEN={PASSWORD} fetch {{shard}}",
    )
    shown = without_secrets(config)
    assert shown["data"]["sources"]["text"]["url"] == "https://host:8080/pile/{shard}"
    assert shown["data"]["sources"]["scenes"]["url"] == "pipe:... {shard}"
    assert PASSWORD not in yaml.safe_dump(shown)
    assert shown | {"data": None} == config.model_dump(mode="json") | {"data": None}


def test_the_plan_of_a_run_shows_no_secret(make_config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(make_config(f"data.sources.text.url=https://me:{PASSWORD}@host/{{shard}}"), world_size=2)
    shown = capsys.readouterr().out
    assert "url: https://host/{shard}" in shown and PASSWORD not in shown


needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


def records(run_folder: Path) -> list[Any]:
    """What W&B has written to its file, once its service has written the end."""
    deadline = time.monotonic() + 60
    while True:
        found = list(written_records(run_folder))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, "W&B does not write the end of the run"
        time.sleep(0.05)


def written_records(run_folder: Path) -> Iterator[Any]:
    """Records of W&B's protocol, in LevelDB's log format; one that is still being written is left out."""
    from wandb.proto import wandb_internal_pb2

    (path,) = run_folder.glob("wandb/offline-run-*/run-*.wandb")
    content, at, parts = path.read_bytes(), 7, b""  # the file begins with a header of its own
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(content):  # whole, or last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(run_folder: Path) -> list[dict[str, str]]:
    return [
        {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in records(run_folder)
        if record.WhichOneof("record_type") == "history"
    ]


@needs_wandb
def test_wandb_has_every_figure_of_an_offline_run(make_config: Any, run_folder: Path) -> None:
    address = f"https://me:{PASSWORD}@host/{{shard}}"
    config = make_config(
        "monitor.sinks.wandb={mode: offline, project: watched}", f"data.sources.text.url={address}"
    )
    show(config, run_folder)
    lines = history(run_folder)
    (figures,) = (line for line in lines if "loss/all" in line)
    assert {name: float(figures[name]) for name in FIGURES} == FIGURES
    assert figures["step"] == "7"
    shown = {name for line in lines for name in line}
    assert {"held_out/text", "texts/config/sha256", "pictures/mask/decoder/sha256"} <= shown
    (run,) = (record.run for record in records(run_folder) if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("watched", "demo")
    assert run.run_id == (run_folder / "logs/wandb_id").read_text()
    for path in (run_folder / "wandb").rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path


@needs_wandb
@pytest.mark.parametrize("key", [None, "a" * 40], ids=["no key", "no network"])
def test_wandb_without_a_key_or_a_network_is_written_to_files(
    make_config: Any,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    key: str | None,
) -> None:
    import wandb

    wandb.teardown()  # settings are read once in a process
    monkeypatch.setattr("metalm.training.monitor.weights_and_biases._INIT_S", 2)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(run_folder / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    show(make_config("monitor.sinks.wandb={}"), run_folder)
    assert "the run is written to files" in caplog.text
    assert ("no key" in caplog.text) == (key is None)
    assert key is None or key not in caplog.text
    assert any("loss/all" in line for line in history(run_folder))


@needs_wandb
def test_whatever_wandb_raises_a_run_goes_on(
    make_config: Any, run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def fail(*arguments: Any, **options: Any) -> None:
        raise wandb.Error("the service is gone")

    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", fail)
    with caplog.at_level(logging.WARNING):
        show(make_config("monitor.sinks.wandb={mode: offline}"), run_folder)
    assert caplog.text.count("shows this run no more: Error: the service is gone") == 1
    assert read_metrics(run_folder)[1]["loss/all"] == 2.5
