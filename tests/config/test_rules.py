from __future__ import annotations

import json
from pathlib import Path

import pytest

from metalm.config import load_config
from metalm.config.rules import check_topology
from metalm.errors import ConfigError, TopologyError

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "pipelines" / "demo.yaml"
SIZES = [
    "model.decoder={num_layers: 2, hidden_size: 128, num_heads: 4}",
    "model.encoders.text={num_layers: 1, hidden_size: 96, num_heads: 3, max_text_positions: 32}",
    "model.encoders.scene.image={image_size: 48, patch_size: 12}",
]
"""What the expected messages are about, whatever the demo's sizes come to be."""


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.decoder.num_heads=7", "model.decoder.hidden_size = 128 is not divisible by num_heads = 7"),
        ("model.decoder.num_kv_heads=3", "num_heads = 4 is not divisible by num_kv_heads = 3"),
        ("model.decoder.qkv_biases=true", "qkv_biases is for a decoder with biases: false"),
        ("model.decoder.positions=learned", "max_positions = None is below data.sequence_length"),
        ("model.decoder.max_positions=512", "is the length of learned positions, not of sinusoidal ones"),
        ("model.decoder.rope_scaling={factor: 2}", "rope_scaling is for positions: rope, not sinusoidal"),
        ("model.decoder.rope_base=5", "model.decoder.rope_base is for positions: rope, not sinusoidal"),
        ("model.encoders.text.rope_base=5", "encoders.text.rope_base is for positions: rope, not learned"),
        (
            "initialize.new=[encoders.x.*]",
            "initialize.new is of a run that starts from initialize.decoder",
        ),
        (
            "data.sources={text: {weight: 1.0e308}, scenes: {weight: 1.0e308}}",
            "data.sources: the weights add up to infinity: divide all of them by the same number",
        ),
        ("data.sources.all={path: data/all, readers: {}}", "loss/all is the loss of all sources"),
        (
            "training.schedule={decay: constant, final_fraction: 0.1}",
            "final_fraction = 0.1 is given, but training.schedule.decay is constant",
        ),
        (
            "model.decoder={positions: rope, rope_scaling: {factor: 2, low_frequency_factor: 4}}",
            "low_frequency_factor = 4.0 is not below high_frequency_factor = 4.0",
        ),
        (
            "model.decoder={positions: rope, hidden_size: 12}",
            "hidden_size / num_heads = 3 must be even for positions: rope",
        ),
        (
            "model.decoder={scale_embedding: false, scale_docked_vectors: true}",
            "scale_docked_vectors is given, but model.decoder.scale_embedding is false",
        ),
        (
            "training.schedule={decay: constant, decay_steps: 10}",
            "decay_steps = 10 is given, but training.schedule.decay is constant",
        ),
        (
            "training={steps: 100, schedule: {warmup_steps: 60, decay_steps: 50}}",
            "warmup_steps = 60 and decay_steps = 50 are together above training.steps = 100",
        ),
        (
            "monitor.profile_steps=[20, 1000000]",
            "monitor.profile_steps has 1000000, above training.steps = ",
        ),
        (
            "initialize={run: runs/a, decoder: runs/b}",
            "initialize.run goes on with all of a checkpoint: leave initialize.decoder",
        ),
        (
            "checkpoint={keep_best: {figure: held_out/pile}}",
            "'held_out/pile' is of no source of data.evaluation (held_out/text, held_out/scenes",
        ),
        (
            "checkpoint={every_steps: 200, keep_best: {figure: held_out/text}}",
            "evaluate_every_steps = 300 is not a multiple of checkpoint.every_steps = 200",
        ),
        ("model.encoders.text.num_heads=7", "model.encoders.text.hidden_size = 96 is not divisible"),
        ("model.encoders.scene.image.patch_size=7", "image_size = 48 is not divisible by patch_size = 7"),
        (
            "model.encoders.scene.relative_bias={}",
            "model.encoders.scene: relative_bias is of tokens in a line",
        ),
        (
            "model.encoders.text.relative_bias={num_buckets: 32, max_distance: 8}",
            "max_distance = 8 is not above a quarter of num_buckets = 32",
        ),
        (
            "model.decoder={normalization: pre_ln, dropout: 0.1}",
            "model.decoder.dropout = 0.1 is for normalization: deepnorm, not pre_ln",
        ),
        ("model.encoders.text.joint_layers=1", "model.encoders.text.joint_layers is given, but"),
        ("model.encoders.text.trained_layers=2", "text.trained_layers = 2 is above num_layers = 1"),
        ("model.decoder.trained_layers=99", "model.decoder.trained_layers = 99 is above num_layers"),
        (
            "model={decoder: {trained_layers: none}, encoders: {text: {trained_layers: none, "
            "trained_connector: false}, scene: {trained_layers: none, trained_connector: false}}}",
            "nothing is trained: model.decoder.trained_layers is none, and no encoder, connector or adapter",
        ),
        (
            "model.decoder.adapter={targets: [qkv]}",
            "model.decoder.adapter.targets: 'qkv' is none of query_key_value, attention_output, feed_forw",
        ),
        (
            "model.encoders.text.adapter={kind: ia3, targets: [feed_forward_in]}",
            "'feed_forward_in' is none of query_key_value, feed_forward_out, which ia3 can adapt",
        ),
        (
            "model.decoder={trained_layers: 1, adapter: {kind: lora}}",
            "trained_layers = 1 with an adapter, beside which all layers are frozen: leave one of them out",
        ),
        ("model.decoder.adapter={kind: ia3, rank: 4}", "rank and alpha are lora's; ia3 has neither"),
        (
            "training.optimizer.learning_rates={connectors: {scen: 1.0e-3}}",
            "training.optimizer.learning_rates.connectors.scen is not in model.encoders (text, scene)",
        ),
        (
            "data.evaluation.scenes.augmentation={}",
            "data.evaluation.scenes.augmentation is given, but evaluation is of images as they are",
        ),
        (
            "data.sources.text.augmentation={}",
            "data.sources.text.augmentation is of images, but data.sources.text.readers names no encoder",
        ),
        (
            "model.encoders.scene.image=null",
            "data.sources.scenes.readers.image = 'scene', but that encoder has no `image` section",
        ),
        (
            "data.sources.scenes.readers.image=text",
            "data.sources.scenes.readers.image = 'text', but that encoder has no `image` section",
        ),
        (
            "data.sources.scenes.readers.image=scen",
            "data.sources.scenes.readers.image = 'scen' is not in model.encoders (text, scene)",
        ),
        (
            "data.sources.text.readers.text=txet",
            "data.sources.text.readers.text = 'txet' is not in model.encoders: did you mean 'text'?",
        ),
        (
            "data.evaluation.text.readers.txt=text",
            "data.evaluation.text.readers.txt: no such modality; known: text, image, audio",
        ),
        ("data.spans.max_length=64", "data.spans.max_length = 64 is above model.encoders.text.max_text"),
        ("data.spans.min_length=33", "min_length = 33 is above data.spans.max_length = 32"),
        ("data.sequence_length=16", "16 patches, start, one caption token and end do not fit"),
        ("data.lanes=7", "training.global_batch_size = 16 is not divisible by data.lanes = 7"),
        ("training.schedule.warmup_steps=99999", "warmup_steps = 99999 is not below training.steps"),
        ("training.steps=40", "training.steps = 40: give training.schedule.warmup_steps=4 as well"),
        ("data.lanes=12", "such as data.lanes=4"),
        ("deepspeed.decoder=deepspeed_configs/absent.json", "absent.json does not exist"),
    ],
)
def test_contradictions_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, [*SIZES, override])
    assert message in str(caught.value)


def test_text_may_name_an_encoder_that_the_model_lacks() -> None:
    config = load_config(DEMO, [*SIZES, "data.sources.text.readers.text=grammar"])
    assert config.data.sources["text"].readers == {"text": "grammar"}


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({"zero_optimization": {"stage": 1}, "optimizer": {}}, [], "holds optimizer, which the pipeline"),
        ({"zero_optimization": {"stage": 0}}, [], "stage must be 1, 2 or 3, not 0"),
        ({}, [], "stage must be 1, 2 or 3, not None"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            [],
            "offload_optimizer.device must be cpu, not 'nvme'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            [],
            "needs zero_force_ds_cpu_optimizer: false",
        ),
        (
            {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            [],
            "holds data_types, which the pipeline owns",
        ),
        (
            {"zero_optimization": {"stage": 1}, "csv_monitor": {"enabled": True, "output_path": "/tmp"}},
            [],
            "zero.json holds csv_monitor, which is refused: monitor.sinks of the pipeline says where",
        ),
        (
            {"zero_optimization": {"stage": 1}, "flops_profiler": {"enabled": True, "output_file": "/tmp/x"}},
            [],
            "holds flops_profiler.output_file, which is refused: leave it out, and the profile is printed",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
            [],
            "holds zero_optimization.offload_param.nvme_path, which is refused",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            [],
            "offload_param.device must be cpu, not 'nvme'",
        ),
    ],
)
def test_deepspeed_json_is_checked(tmp_path: Path, content: dict, overrides: list[str], message: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, [f"deepspeed.decoder={path}", *overrides])
    assert message in str(caught.value)


def test_what_deepspeed_prints_may_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    asked = {"flops_profiler": {"enabled": True}, "comms_logger": {"enabled": True}}
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **asked}))
    assert load_config(DEMO, [f"deepspeed.decoder={path}"]).deepspeed.decoder == path


@pytest.mark.parametrize("world_size", [2, 4, 8, 16, 32])
def test_fitting_layouts_pass(world_size: int) -> None:
    check_topology(load_config(DEMO, ["training.micro_batch_size=1"]), world_size)


@pytest.mark.parametrize(("tensor", "context"), [(1, 4), (2, 2), (4, 1)])
def test_context_ranks_may_be_more_or_fewer_than_the_key_heads(tensor: int, context: int) -> None:
    layout = [f"parallel={{tensor: {tensor}, context: {context}}}", "training.micro_batch_size=1"]
    for key_heads in (4,) if tensor == 4 else (2, 4):
        check_topology(load_config(DEMO, [*SIZES, *layout, f"model.decoder.num_kv_heads={key_heads}"]), 8)


@pytest.mark.parametrize(
    ("world_size", "overrides", "message"),
    [
        (3, [], "3 rank(s) cannot be split into tensor-parallel groups of 2"),
        (
            1,
            [],
            "start a multiple of 2 (`torchrun --nproc-per-node 2 -m metalm ...`; in a dry run --ranks 2)",
        ),
        (8, ["parallel.tensor=8"], "model.decoder.num_heads = 4 is not divisible by parallel.tensor = 8"),
        (
            4,
            ["parallel.tensor=4", "model.decoder.num_kv_heads=2"],
            "model.decoder.num_kv_heads = 2 is not divisible by parallel.tensor = 4",
        ),
        (
            2,
            ["parallel={tensor: 2, sequence_parallel: true}", "data.sequence_length=129"],
            "data.sequence_length = 129 is not divisible by parallel.tensor = 2",
        ),
        (
            6,
            ["parallel={tensor: 2, context: 2}"],
            "6 rank(s) cannot be split into groups of parallel.tensor = 2 x parallel.context = 2",
        ),
        (
            8,
            ["parallel={tensor: 2, context: 4}"],
            "model.decoder.num_heads = 4 is not divisible by parallel.tensor = 2 x parallel.context = 4",
        ),
        (
            4,
            [
                "parallel={tensor: 1, context: 4}",
                "model.decoder.hidden_size=96",
                "model.decoder.num_heads=12",
                "model.decoder.num_kv_heads=3",
            ],
            "model.decoder.num_kv_heads = 3 leaves 3 to a tensor-parallel rank, which parallel.context = 4",
        ),
        (
            2,
            ["parallel={tensor: 1, context: 2}", "data.sequence_length=129"],
            "data.sequence_length = 129 is not divisible by parallel.context = 2",
        ),
        (
            4,
            ["parallel={tensor: 2, context: 2, sequence_parallel: true}", "data.sequence_length=130"],
            "data.sequence_length = 130 is not divisible by parallel.context = 2 x parallel.tensor = 2",
        ),
        (6, ["parallel.tensor=2"], "data.lanes = 16 is not divisible by 3 data-parallel ranks"),
        (4, [], "16 is not divisible by 2 data-parallel ranks x training.micro_batch_size = 16"),
        (4, [], "start fewer ranks, or give a training.micro_batch_size that divides 8"),
        (
            6,
            [],
            "x training.micro_batch_size = 16: start as many as divide it, or give another",
        ),
    ],
)
def test_impossible_layouts_are_named(world_size: int, overrides: list[str], message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        check_topology(load_config(DEMO, [*SIZES, *overrides]), world_size)
    assert message in str(caught.value)
