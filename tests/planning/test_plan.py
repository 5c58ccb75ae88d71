from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distributed.planned import measured_batches, planned_config
from distributed.tiny import tiny_config
from metalm.config import RunConfig
from metalm.errors import ConfigError, TopologyError
from metalm.model.flops import count_training_flops
from metalm.planning.devices import device_by_driver_name, find_device
from metalm.planning.plan import plan_run
from metalm.planning.report import describe_cost
from metalm.planning.search import overrides, search_layouts
from metalm.planning.workload import Assumed, mean_row, source_rows
from metalm.training.dry_run import describe_plan


def test_the_dry_run_states_the_batch_arithmetic() -> None:
    text = describe_plan(tiny_config("unused", tensor=2, micro_batch_size=1), 4)
    assert "4: tensor 2 x data 2" in text
    assert "8 rows = 2 data-parallel ranks x 4 micro-batch(es) x 1 row(s)" in text
    assert "4, 2 per data-parallel rank" in text


def test_an_impossible_layout_has_no_plan() -> None:
    with pytest.raises(TopologyError):
        describe_plan(tiny_config("unused", tensor=2), 3)


def test_the_operations_of_a_step_equal_those_counted_in_its_batches() -> None:
    """The rows hold exactly what the mean row is expected to hold."""
    config = planned_config()
    counted = sum(count_training_flops(b, config.model) for b in measured_batches(config, 0, 1))
    plan = plan_run(config, 1, find_device("cpu"))
    assert plan.model_flops == pytest.approx(counted, rel=1e-9)
    # Nothing is padding here; attention's backward makes 7 products a layer, of which 4 are counted.
    counts = [(config.model.decoder, plan.row.pairs), (config.model.encoders["text"], 32 * 32)]
    again = sum(3 * 2 * one.num_layers * one.hidden_size * pairs for one, pairs in counts)
    rows = config.training.global_batch_size
    assert plan.executed_flops == pytest.approx(counted + rows * again, rel=1e-9)


def test_the_mean_row_weighs_the_sources() -> None:
    """Of text rows a quarter in spans of about 12; of pairs 4 patches and 10 tokens, two to a row of 40."""
    config = tiny_config("unused")
    spans = config.data.spans.model_copy(update={"min_length": 11, "max_length": 12})
    sources = config.data.sources
    sources = sources | {"pairs": sources["pairs"].model_copy(update={"weight": 3.0})}
    data = config.data.model_copy(update={"spans": spans, "sources": sources})
    config = config.model_copy(update={"data": data})
    row = mean_row(config, source_rows(config, Assumed(caption_tokens=10)))
    assert row.positions == pytest.approx(40 / 4 + 32 * 3 / 4)
    assert row.encoders["text"].elements == pytest.approx(0.25 * 40 / 4)
    assert row.encoders["image"].patches == pytest.approx(2 * 4 * 3 / 4)
    assert row.encoders["image"].elements == pytest.approx(2 * (4 + 4.5) * 3 / 4)


def test_a_row_of_examples_holds_images_and_texts_of_which_half_is_encoded() -> None:
    """Each of 4 patches, 128 tokens, start and end; the encoder of text reads 16 of 64 at once."""
    config = tiny_config("unused")
    source = {"path": "unused", "readers": {"image": "image", "text": "text"}, "overflow": "cut_left"}
    data = config.data.model_dump() | {"sources": {"chats": source}, "sequence_length": 268}
    config = type(config).model_validate(config.model_dump() | {"data": data})
    row = mean_row(config, source_rows(config))
    assert row.positions == 268
    assert row.encoders["image"].elements == row.encoders["image"].patches == 2 * 4
    assert row.encoders["text"].elements == 2 * 16
    told = "examples of 128 tokens of text, half of it encoded, and 1 image(s) or clip(s)"
    assert told in describe_cost(plan_run(config, 1, find_device("cpu")))
    of_pages = mean_row(config, source_rows(config, Assumed(example_tokens=53, example_media=3)))
    image, text = of_pages.encoders["image"], of_pages.encoders["text"]
    assert (image.elements, image.pairs, image.patches) == (4 * 3 * 4, 4 * 3 * 4**2, 4 * 3 * 4)
    assert (text.elements, text.pairs) == (4 * 16, 4 * 16**2)


def test_time_is_the_sum_of_its_parts_and_lies_within_its_range() -> None:
    config, device = planned_config(tensor=2), find_device("h100")
    plan = plan_run(config, 4, device)
    assert plan.step_s == pytest.approx(sum(plan.parts_s.values()))
    assert plan.days == pytest.approx(plan.step_s * config.training.steps / 86400)
    least, most, causes = plan.range_s
    assert 0 < least < plan.step_s < most
    assert {cause.figure for cause in causes} == set(plan.calibration.uncertain())
    widths = [cause.slow_s - cause.fast_s for cause in causes]
    assert widths == sorted(widths, reverse=True)
    assert min(widths) >= 0
    text = describe_cost(plan)
    assert f"step            {least:.3f} to {most:.3f} s" in text
    assert causes[0].figure in text
    assert device.source in text


def test_a_tensor_group_across_nodes_is_charged_their_link() -> None:
    config = planned_config(tensor=4)
    inside = plan_run(config, 4, find_device("h100"))
    content = config.model_dump()
    content["model"]["decoder"] |= {"num_heads": 16}
    content["parallel"]["tensor"] = 16
    across = plan_run(type(config).model_validate(content), 16, find_device("h100"))
    assert [t.spans_nodes for t in inside.traffic if t.kind == "decoder all-reduces"] == [False]
    assert [t.spans_nodes for t in across.traffic if t.kind == "decoder all-reduces"] == [True]


def test_the_search_offers_layouts_that_fit_best_first_and_what_to_type() -> None:
    config = planned_config()
    found = search_layouts(config, 4, find_device("h100"))
    assert found.plans
    assert all(plan.fits for plan in found.plans)
    times = [plan.step_s for plan in found.plans]
    assert times == pytest.approx(sorted(times), rel=0.01)
    tensors = {plan.config.parallel.tensor for plan in found.plans}
    assert tensors == {1, 2, 4}
    # The rows of a step, the seed and the model stay as they are.
    for plan in found.plans:
        kept = {"global_batch_size", "steps", "optimizer", "precision"}
        assert plan.config.training.model_dump(include=kept) == config.training.model_dump(include=kept)
    typed = overrides(next(p for p in found.plans if p.config.parallel.tensor == 2), config)
    assert "parallel.tensor=2" in typed


def test_a_search_without_room_names_the_smallest_need() -> None:
    config = planned_config()
    content = config.model_dump()
    content["data"]["sequence_length"] = 2**26
    found = search_layouts(type(config).model_validate(content), 1, find_device("a100"))
    assert not found.plans
    assert found.tried == found.too_large > 0
    assert found.smallest is not None
    assert not found.smallest.fits
    assert found.smallest.config.model.decoder.recompute


def test_the_search_tries_the_config_s_own_sizes_too() -> None:
    config = planned_config()
    content = config.model_dump()
    content["training"] |= {"micro_batch_size": 3, "global_batch_size": 12}
    content["data"]["lanes"] = 12
    found = search_layouts(type(config).model_validate(content), 4, find_device("h100"))
    assert {plan.config.training.micro_batch_size for plan in found.plans} == {1, 2, 3, 4}


def test_a_search_without_a_layout_says_why() -> None:
    with pytest.raises(TopologyError, match="7"):
        search_layouts(planned_config(), 7, find_device("h100"))


def test_a_broken_json_is_passed_over_unless_it_is_the_config_s(tmp_path: Path) -> None:
    for name in ("decoder_zero1.json", "encoders_zero1.json"):
        shutil.copy(Path("deepspeed_configs") / name, tmp_path / name)
    broken = tmp_path / "decoder_mine.json"
    broken.write_text("{broken")
    config = planned_config(
        decoder=str(tmp_path / "decoder_zero1.json"), encoders=str(tmp_path / "encoders_zero1.json")
    )
    assert search_layouts(config, 2, find_device("h100")).plans
    deepspeed = config.deepspeed.model_copy(update={"decoder": broken})
    with pytest.raises(ConfigError, match="decoder_mine"):
        search_layouts(config.model_copy(update={"deepspeed": deepspeed}), 2, find_device("h100"))


def test_host_memory_of_offloaded_optimizers_is_told(tmp_path: Path) -> None:
    path = tmp_path / "decoder_offload.json"
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    plan = plan_run(planned_config(decoder=str(path)), 4, find_device("h100"))
    engine = plan.engines["decoder"]
    assert engine.held.optimizer == 0
    assert engine.host_bytes == 12 * -(-engine.count.trained_per_rank // 4)
    told = "host memory     0.0 GiB a rank for offloaded optimizers, 0.0 for 4 of a node"
    assert told in describe_cost(plan)
    assert "offloaded" not in describe_cost(plan_run(planned_config(), 4, find_device("h100")))
    content = plan.config.model_dump()
    content["training"]["average"] = {"decay": 0.99}
    averaged = plan_run(RunConfig.model_validate(content), 4, find_device("h100")).engines["decoder"]
    assert averaged.held.optimizer == 0
    assert averaged.host_bytes == averaged.snapshot_bytes == 16 * -(-engine.count.trained_per_rank // 4)


def test_devices_are_found_by_both_names() -> None:
    assert find_device("h100").peak_tflops == 989.4
    reported = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100_pcie", "NVIDIA H200": "h200"}
    for driver, name in reported.items():
        assert device_by_driver_name(driver) is find_device(name)
    assert device_by_driver_name("NVIDIA GeForce") is None
    with pytest.raises(ConfigError, match="h100"):
        find_device("h1000")


def test_context_ranks_share_rows_and_send_what_attention_exchanges() -> None:
    """Of 4 ranks two share each row, in two micro-batches of 64 positions a rank; 4 layers of width 128."""
    config = planned_config(context=2)
    assert "ranks           4: tensor 1 x context 2 x data 2" in describe_plan(config, 4)
    (sent,) = (t for t in plan_run(config, 4, find_device("h100")).traffic if t.kind == "context exchanges")
    assert (sent.group_size, sent.spans_nodes) == (2, False)
    # Half of the queries, keys, values and attended, both ways; and of the gradients of 64 encoded vectors.
    assert sent.num_bytes == pytest.approx(2 * 4 * 0.5 * 128 * (64 * 4 * 2 * 4 + 64))
