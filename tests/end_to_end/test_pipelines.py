"""The shipped pipelines: each has a plan, and each `_tiny` twin is the same run in small, which trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from distributed.ranks import run_program
from metalm.checkpoint.folders import find_checkpoint
from metalm.checkpoint.reader import CheckpointReader
from metalm.config import load_config
from metalm.run_metrics import read_metrics
from metalm.training.dry_run import describe_plan
from reference.pretrained import save_pretrained

REPOSITORY = Path(__file__).parents[2]
PIPELINES = sorted((REPOSITORY / "pipelines").glob("*.yaml"))
TWINS = [path for path in PIPELINES if path.stem.startswith("pretrain") and path.stem.endswith("_tiny")]
STARTED_FROM_A_RUN = [
    path.stem.removesuffix("_tiny") for path in PIPELINES if path.stem.endswith("_tiny") and path not in TWINS
]
SIZES = {
    *("vocab_size", "num_layers", "hidden_size", "num_heads", "max_text_positions", "joint_layers"),
    *("num_kv_heads", "ffn_hidden_size"),
    *("num_buckets", "max_distance", "image_size", "patch_size", "tensor"),
    *("sequence_length", "lanes", "workers", "min_length", "max_length"),
    *("steps", "global_batch_size", "micro_batch_size", "warmup_steps", "decay_steps"),
    *("every_steps", "evaluate_every_steps", "sample_every_steps"),
    *("evaluation_rows", "num_samples", "sample_new_tokens"),
}
FOLDERS = {"name", "path", "tokenizer"}


def run(num_ranks: int, path: Path, folder: Path, name: str, *overrides: str) -> dict[int, float]:
    """Train a pipeline in `folder/name`; its losses by step."""
    own = [f"run.folder={folder}", f"run.name={name}", "training.precision=fp32", "training.steps=6"]
    own += ["checkpoint.every_steps=3", "monitor.log_every_steps=1", "monitor.evaluation_rows=2"]
    words = ["-m", "metalm", "train", str(path), *own, *overrides]
    code, output = run_program(words, num_ranks, timeout_s=250)
    assert code == 0, output
    return {entry["step"]: entry["loss/all"] for entry in read_metrics(folder / name) if "loss/all" in entry}


@pytest.fixture
def demo_folder(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start in, where the demo's data is a smaller one."""
    (tmp_path / "data/demo/shards").mkdir(parents=True)
    (tmp_path / "deepspeed_configs").symlink_to(REPOSITORY / "deepspeed_configs")
    (tmp_path / "data/demo/tokenizer").symlink_to(tiny_data / "tokenizer")
    for kind in ("text", "scenes"):
        for split in ("train", "heldout"):
            (tmp_path / f"data/demo/shards/{kind}_{split}").symlink_to(tiny_data / kind)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def differences(one: Any, other: Any, key: str = "") -> Iterator[str]:
    """The keys of the values that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            yield from differences(one.get(name), other.get(name), name)
    elif one != other:
        yield key


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_pipeline_has_a_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = load_config(path)
    assert "decoder" in describe_plan(config, config.parallel.tensor)


def test_every_pretraining_has_a_twin() -> None:
    wanted = {
        f"{path.stem}_tiny" for path in PIPELINES if path.stem.startswith("pretrain") and path not in TWINS
    }
    assert wanted == {path.stem for path in TWINS}


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_a_twin_differs_in_sizes_and_folders_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    twin, whole = load_config(path), load_config(path.with_stem(path.stem.removesuffix("_tiny")))
    found = set(differences(twin.model_dump(), whole.model_dump()))
    assert found <= SIZES | FOLDERS
    assert {"num_layers", "hidden_size", "steps"} <= found


@pytest.mark.parametrize("name", STARTED_FROM_A_RUN)
def test_what_starts_from_a_run_differs_in_small_in_sizes_and_folders_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    twin, whole = (load_config(REPOSITORY / f"pipelines/{name}{end}.yaml") for end in ("_tiny", ""))
    starts = [config.initialize for config in (twin, whole)]
    assert starts[0].new == starts[1].new
    contents = [config.model_dump(exclude={"initialize"}) for config in (twin, whole)]
    assert set(differences(*contents)) <= SIZES | FOLDERS


def test_an_encoder_is_added_to_a_trained_run(demo_folder: Path) -> None:
    """As shipped, and with one of transformers instead: the rest goes on from what was learnt."""
    base = run(1, REPOSITORY / "pipelines/pretrain_language_tiny.yaml", demo_folder, "base")
    trained = weights(demo_folder / "base", 6)
    start = [f"initialize.{part}={demo_folder / 'base'}" for part in ("decoder", "encoders")]
    tiny = REPOSITORY / "pipelines/add_encoder_tiny.yaml"
    save_pretrained("vit", demo_folder / "vit", image_size=48, patch_size=12)
    vit = demo_folder / "vit.yaml"
    vit.write_text(f"extends: {tiny}\nmodel: {{encoders: {{image: null}}}}\n")
    with_vit = demo_folder / "with_vit.yaml"
    image = {"pretrained": {"path": str(demo_folder / "vit")}, "trained_layers": "none"}
    content = {"extends": str(vit), "model": {"encoders": {"image": image}}}
    with_vit.write_text(yaml.safe_dump(content))
    for path, name in ((tiny, "added"), (with_vit, "vit_added")):
        # A learning rate near nothing: what the run starts from is still there after six steps.
        found = run(2, path, demo_folder, name, *start, "training.optimizer.learning_rate=1e-12")
        assert sorted(found) == sorted(base)
        now = weights(demo_folder / name, 6)
        new = {key for key in now if key.startswith("encoders/encoders.image.")}
        assert now.keys() - new == trained.keys()
        for key, value in trained.items():
            torch.testing.assert_close(now[key], value, atol=1e-9, rtol=1e-5)
        assert len(new) > 10
    model = save_pretrained("vit", demo_folder / "again", image_size=48, patch_size=12)
    for key, value in model.named_parameters():
        if not key.startswith("pooler."):
            assert torch.equal(now[f"encoders/encoders.image.model.{key}"], value)


def weights(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(run_folder / "checkpoints" / f"step_{step:08d}")
    return {
        f"{component}/{name}": reader.read(component, name)
        for component in reader.components()
        for name in reader.parameters(component)
    }


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_a_twin_trains_and_goes_on_elsewhere_with_the_same_losses(path: Path, demo_folder: Path) -> None:
    expected = run(2, path, demo_folder, "two", "parallel.tensor=2")
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    first = demo_folder / "two" / "checkpoints" / "step_00000003"
    (demo_folder / "one" / "checkpoints").mkdir(parents=True)
    (demo_folder / "one" / "checkpoints" / first.name).symlink_to(first)
    found = run(1, path, demo_folder, "one", "parallel.tensor=1", "training.micro_batch_size=8")
    assert found == pytest.approx({step: expected[step] for step in (4, 5, 6)}, abs=1e-5)


def test_the_language_setting_starts_from_a_pretrained_text_encoder(demo_folder: Path) -> None:
    """Pretrained by replaced-token detection on four ranks, with the losses of one."""
    pretrain, language = (
        REPOSITORY / f"pipelines/pretrain_{name}_tiny.yaml" for name in ("text_encoder", "language")
    )
    alone = run(1, pretrain, demo_folder, "alone", "training.micro_batch_size=4")
    assert run(4, pretrain, demo_folder, "four", "parallel.tensor=2") == pytest.approx(alone, abs=1e-5)
    start = [f"initialize.encoders={demo_folder}/four", 'initialize.new=["encoders.text.connector.*"]']
    still = ["training.optimizer.learning_rate=1.0e-12", "training.optimizer.weight_decay=0"]
    run(1, language, demo_folder, "language", *start, *still)
    pretrained, now = (
        {key: value for key, value in weights(demo_folder / name, 6).items() if key.startswith("encoders/")}
        for name in ("four", "language")
    )
    head, connector = (
        {key for key in found if f".{name}." in key}
        for found, name in ((pretrained, "detection_head"), (now, "connector"))
    )
    assert (len(head), len(connector)) == (4, 2)
    assert pretrained.keys() - head == now.keys() - connector
    for key in now.keys() - connector:
        torch.testing.assert_close(now[key], pretrained[key], atol=1e-9, rtol=0)


def test_a_run_at_more_pixels_starts_from_one_at_fewer(demo_folder: Path) -> None:
    """Nothing is learnt in the second run, so that its weights are those it started with."""
    path, short = REPOSITORY / "pipelines" / "pretrain_vision_language_tiny.yaml", "training.steps=3"
    ramp = "training.schedule.warmup_steps=1"
    run(1, path, demo_folder, "small", short, ramp)
    start = [f"initialize.{part}={demo_folder / 'small'}" for part in ("decoder", "encoders")]
    still = ["training.optimizer.learning_rate=1.0e-12", "training.optimizer.weight_decay=0"]
    size = "model.encoders.pairs.image.image_size=72"
    run(1, path, demo_folder, "large", short, ramp, size, *start, *still)
    small, large = (CheckpointReader(find_checkpoint(demo_folder / name)) for name in ("small", "large"))
    for name, shape in small.parameters("encoders").items():
        weight, found = small.read("encoders", name), large.read("encoders", name)
        if name == "encoders.pairs.image_positions.weight":
            assert (shape[0], found.shape[0]) == (16, 36)
            grid = weight.view(1, 4, 4, -1).permute(0, 3, 1, 2)
            weight = nn.Upsample(size=6, mode="bicubic")(grid).flatten(2)[0].T
        torch.testing.assert_close(found, weight, atol=1e-6, rtol=0)
