"""What a plan's times are made of: read from files, between what was measured, with where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distributed.planned import planned_config
from metalm.config import RunConfig, load_config
from metalm.errors import ConfigError
from metalm.parallel.bandwidth import LinkSpeeds
from metalm.planning.calibration import FIGURES, overlay, write_links
from metalm.planning.devices import DEVICES, find_device
from metalm.planning.plan import USABLE_SHARE, Plan, plan_run
from metalm.planning.report import describe_cost
from metalm.planning.shipped_calibration import shipped_calibration

ZERO_HEAD = {"mask": "causal", "head_size": 0, "forward_tflops": 1.0, "both_tflops": 1.0}


def written(tmp_path: Path, **content: Any) -> Path:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_all_figures_and_says_where_they_come_from(name: str) -> None:
    calibration = shipped_calibration(find_device(name))
    assert calibration.figures.keys() == FIGURES.keys()
    for figure in calibration.figures.values():
        assert 0 <= figure.low <= figure.value <= figure.high
        assert figure.source
    assert calibration.sources.keys() == {"products", "attention", "links"}


def test_a_file_takes_the_place_of_what_it_holds_and_is_named(tmp_path: Path) -> None:
    shipped = shipped_calibration(find_device("h100"))
    path = written(
        tmp_path,
        source="one afternoon",
        products=[{"rows": 64, "inner": 64, "columns": 64, "tflops": 10.0}],
        attention=[{"mask": "encoder", "head_size": 64, "forward_tflops": 3, "both_tflops": 2}],
        figures={"memory": {"value": 2e12, "low": 1e12, "high": 3e12}},
        links=[{"ranks": 8, "spans_nodes": False, "latency_s": 1e-5, "bytes_per_s": 1e11}],
    )
    found = overlay(shipped, path)
    assert found.product_rate(64, 64, 64) == pytest.approx(10e12)
    assert found.attention_rates("encoder", 64, 128) == pytest.approx((3e12, 2e12))
    assert found.attention_rates("causal", 64, 128) == shipped.attention_rates("causal", 64, 128)
    assert found["memory"] == 2e12
    assert found["kernel"] == shipped["kernel"]
    assert found.link(4, spans_nodes=False).bytes_per_s == 1e11
    assert found.link(4, spans_nodes=True) == shipped.link(4, spans_nodes=True)
    text = describe_cost(plan_run(planned_config(tensor=2), 4, find_device("h100"), found))
    assert "products: measured.json: one afternoon" in text


def test_a_shape_between_two_has_a_rate_between_theirs_and_at_one_its_own(tmp_path: Path) -> None:
    small = {"rows": 64, "inner": 64, "columns": 64, "tflops": 1.0}
    large = {"rows": 4096, "inner": 4096, "columns": 4096, "tflops": 100.0}
    found = overlay(shipped_calibration(find_device("h100")), written(tmp_path, products=[small, large]))
    assert found.product_rate(64, 64, 64) == pytest.approx(1e12, rel=1e-3)
    assert found.product_rate(512, 512, 512) == pytest.approx(10e12, rel=1e-3)  # the middle of the logarithms


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"figures": {"speed": {"value": 1, "low": 1, "high": 1}}}, "unknown: speed"),
        ({"attention": [ZERO_HEAD]}, "head_size is 0"),
        ({"products": [{"rows": 1, "inner": 1, "columns": 1, "tflops": 0}]}, "tflops is 0"),
        ({"figures": {"memory": {"value": -1, "low": 1, "high": 1}}}, "value is -1"),
        ({"figures": {"memory": {"value": 0, "low": 0, "high": 0}}}, "memory is 0"),
        ({"figures": {"kernel": {"value": 3, "low": 4, "high": 5}}}, "kernel is 3, not between"),
        ({"figures": {"kernel": {"value": "x", "low": "x", "high": "x"}}}, "value is 'x'"),
        ({"links": [{"ranks": 2}]}, "missing"),
        ({"links": [{"ranks": "2", "spans_nodes": True, "latency_s": 0.1, "bytes_per_s": 1.0}]}, "is '2'"),
        ({"device": "NVIDIA H200"}, "measured on NVIDIA H200, and the plan is of H100"),
        ({"device": DEVICES["cpu"].name}, "measured on one rank on a few CPU cores"),
    ],
)
def test_a_file_of_something_else_is_refused_with_what_writes_one(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}.*write one with tools/calibrate.py"):
        overlay(shipped_calibration(find_device("h100")), written(tmp_path, **content))


def test_links_that_preflight_measured_are_medians_over_the_ranks(tmp_path: Path) -> None:
    speeds = [LinkSpeeds(0.0, 100.0 + n, 10.0 + n, 1e-5 * n, 1e-4 * n) for n in (1, 2, 9)]
    write_links(tmp_path / "links.json", speeds, ranks_per_node=8)
    found = overlay(shipped_calibration(find_device("h100")), tmp_path / "links.json")
    inside, between = found.link(8, spans_nodes=False), found.link(64, spans_nodes=True)
    assert (inside.ranks, inside.bytes_per_s, inside.latency_s) == (8, 102 * 2**30, 2e-5)
    assert (between.ranks, between.bytes_per_s, between.latency_s) == (16, 12 * 2**30, 2e-4)


def large(stage: int) -> Plan:
    """Two encoder layers in each of 64 micro-steps, on 64 ranks of eight nodes."""
    config = planned_config(
        tensor=2,
        decoder="deepspeed_configs/decoder_zero1.json",
        encoders=f"deepspeed_configs/encoders_zero{stage}.json",
    )
    content = config.model_dump()
    content["training"] |= {"global_batch_size": 2048, "micro_batch_size": 1, "precision": "bf16"}
    content["data"]["lanes"] = 64
    content["model"]["encoders"]["text"] |= {"hidden_size": 1024, "num_layers": 24, "num_heads": 16}
    return plan_run(RunConfig.model_validate(content), 64, find_device("h100"))


def test_encoders_under_zero_3_send_more_and_keep_the_host_busy() -> None:
    """So the 24 layers, which take 3 GB of memory, are cheaper at stage 1."""
    at_1, at_3 = large(1), large(3)
    sent = [
        sum(part.num_bytes for part in plan.traffic if part.kind.startswith("encoders"))
        for plan in (at_1, at_3)
    ]
    assert sent[1] > 10 * sent[0]
    assert at_3.parts_s["host"] > 2 * at_1.parts_s["host"]
    assert at_3.parts_s["ZeRO beside the computation, not hidden"] > 0
    assert at_3.step_s > 1.5 * at_1.step_s


def test_the_steps_and_memory_of_one_h200_lie_within_the_shipped_range() -> None:
    """Those that were measured with the code as it is, and on which some of the figures rest."""
    measured = json.loads(Path("tools/measured/h200_2026-11-27.json").read_text())
    compared = 0
    for section, record in (
        (section, record)
        for section, found in measured["calls"][-1]["sections"].items()
        for record in found["records"]
        if "setting" in record
    ):
        pipeline = "pretrain_vision_language" if "vision" in section else "pretrain_language"
        config = load_config(Path(f"pipelines/{pipeline}.yaml"), record["overrides"])
        plan = plan_run(config, 1, find_device("h200"))
        least, most, _ = plan.range_s
        assert least < record["step_s"] < most, section
        assert plan.step_s == pytest.approx(record["step_s"], rel=0.1), section
        reserved = record["reserved_gib"] * 2**30
        assert USABLE_SHARE * reserved < plan.total_bytes < 1.1 * reserved, section
        compared += 1
    assert compared == 4


@pytest.mark.parametrize(
    ("overrides", "figure"),
    [
        ([], "host, layer from a graph"),
        (["training.cuda_graphs=false"], "host, decoder layer"),
        (["parallel.tensor=2"], "host, decoder layer"),
        (["model.decoder.recompute=true"], "host, decoder layer"),
    ],
)
def test_the_host_is_as_busy_as_the_way_that_layers_are_launched(overrides: list[str], figure: str) -> None:
    config = load_config(Path("pipelines/pretrain_language.yaml"), ["parallel.tensor=1", *overrides])
    layers = plan_run(config, 2, find_device("h200")).setting.work.host_layers
    assert layers[figure] >= 24
    assert sum(count >= 24 for count in layers.values()) == 1
    on_cpu = plan_run(config, 2, find_device("cpu")).setting.work.host_layers
    assert on_cpu["host, layer from a graph"] == 0
