"""What is trained: frozen parts and learning rates of components, against the plain model."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.finetuned import changed_config
from distributed.ranks import run_ranks
from distributed.test_topologies import read_weights
from distributed.tiny import global_batch, rate_of
from metalm.checkpoint.reader import CheckpointReader
from reference import training as reference
from reference.model import Weights


def train_alone(folder: Path, shape: dict[str, Any], start: str = "new") -> tuple[Weights, Any]:
    """A single rank under ZeRO 1: the weights that it starts with, and its result."""
    (result,) = run_ranks("finetune_tiny", 1, str(folder), json.dumps(shape), start, "1,1")
    return read_weights(folder / "zero_1_1", 0), result


def plain_training(
    start: Weights, shape: dict[str, Any], frozen: Collection[str], **options: Any
) -> tuple[list[float], Weights]:
    steps = range(shape["steps"])
    batches, rates = [global_batch(n) for n in steps], [rate_of(n) for n in steps]
    return reference.train(batches, start, changed_config("", shape), rates, frozen, **options)


def test_a_frozen_decoder_stays_bit_for_bit_and_has_no_gradients(tmp_path: Path) -> None:
    """After twenty steps, whole or sharded; what the encoders learn through it is the plain model's."""
    shape = {
        "tensor": 1,
        "micro_batch_size": 8,
        "steps": 20,
        "changes": {"model.decoder.trained_layers": "none"},
    }
    start, alone = train_alone(tmp_path / "alone", shape)
    frozen = {name for name in start if name.startswith("decoder/")}
    losses, _ = plain_training(start, shape | {"steps": 3}, frozen)
    found = {"alone": alone}
    for layout, changes, pair in (
        ("tensor", {"tensor": 2, "steps": 5}, "1,3"),
        ("data", {"micro_batch_size": 4}, "3,2"),
    ):
        arguments = (str(tmp_path / layout), json.dumps(shape | changes), "new", pair)
        (found[layout],) = run_ranks("finetune_tiny", 2, *arguments)
    for layout, result in found.items():
        steps = len(result["losses"])
        assert result["losses"][:3] == pytest.approx(losses, abs=1e-5), layout
        assert result["losses"] == pytest.approx(alone["losses"][:steps], abs=1e-5), layout
        assert result["drift"] == []
        assert result["may_have_gradients"]["decoder"] == []
        assert result["optimized"].keys() == {"encoders"}
        run = tmp_path / layout / f"zero_{result['zero'].replace(',', '_')}"
        end = read_weights(run, steps)
        assert {name for name in start if torch.equal(end[name], start[name])} == frozen, layout
        reader = CheckpointReader(run / "checkpoints" / f"step_{steps:08d}")
        assert {reader.states("decoder", name) for name in reader.parameters("decoder")} == {("master",)}
    assert len(found["alone"]["losses"]) == len(found["data"]["losses"]) == 20


def test_last_layers_frozen_connectors_and_rates_of_components_are_the_plain_model_s(tmp_path: Path) -> None:
    """Tied output, sequence parallelism, and a resume of the decoder that is then trained whole."""
    changes = {
        "model.decoder.trained_layers": 1,
        "model.encoders.text.trained_connector": False,
        "model.encoders.image.trained_layers": "none",
        "training.optimizer.learning_rates": {
            "decoder": 3e-4,
            "encoders": {"text": 1.2e-3},
            "connectors": {"image": 6e-3},
        },
    }
    shape = {"tensor": 1, "micro_batch_size": 8, "steps": 4, "options": "llama", "changes": changes}
    start, alone = train_alone(tmp_path / "alone", shape)

    def is_frozen(name: str) -> bool:
        if name.startswith("decoder/"):
            return not name.startswith(
                ("decoder/gpt.decoder.layers.1.", "decoder/gpt.decoder.final", "decoder/gpt.output")
            )
        return ("image" in name) != ("connector" in name)

    def factor(name: str) -> float:
        return 0.5 if name.startswith("decoder/") else 2.0 if "text" in name else 10.0

    frozen = {name for name in start if is_frozen(name)}
    losses, weights = plain_training(start, shape, frozen, factors=factor)
    moved = {name for name in start if not torch.equal(start[name], weights[name])}
    assert moved == start.keys() - frozen
    shape |= {"tensor": 2, "sequence_parallel": True}
    results = run_ranks("finetune_tiny", 2, str(tmp_path / "tensor"), json.dumps(shape), "new", "2,1", "3,3")
    for result, folder in ((alone, "alone"), *((result, "tensor") for result in results)):
        assert result["losses"] == pytest.approx(losses, abs=1e-5), result["zero"]
        end = read_weights(tmp_path / folder / f"zero_{result['zero'].replace(',', '_')}", 4)
        for name, value in weights.items():
            torch.testing.assert_close(end[name], value, atol=1e-5, rtol=0)
            assert name not in frozen or torch.equal(end[name], start[name])


def test_a_run_goes_on_with_the_decoder_frozen_and_trained_again(tmp_path: Path) -> None:
    shape = {"tensor": 1, "micro_batch_size": 8, "steps": 1}
    frozen = shape | {"changes": {"model.decoder.trained_layers": "none"}}
    starts, last = [], "new"
    for step, (own, pair) in enumerate(((shape, "1,1"), (frozen, "3,1"), (shape, "1,1"))):
        run_ranks("finetune_tiny", 1, str(tmp_path / str(step)), json.dumps(own), last, pair)
        run = tmp_path / str(step) / f"zero_{pair.replace(',', '_')}"
        before, after = read_weights(run, step), read_weights(run, step + 1)
        assert not starts or all(torch.equal(starts[-1][name], before[name]) for name in before)
        moves = any(not torch.equal(before[name], after[name]) for name in before if "decoder/" in name)
        assert moves == (own is shape)
        starts.append(after)
        last = f"resume:{run}/checkpoints/step_{step + 1:08d}"


@pytest.mark.parametrize("trained_layers", [1, "none"])
def test_copies_of_a_node_are_those_of_the_weights_that_were_loaded(
    trained_layers: object, tmp_path: Path
) -> None:
    """`zero_hpz_partition_size` with frozen layers, which no optimizer step renews."""
    shape = {"tensor": 1, "micro_batch_size": 8, "steps": 2}
    run_ranks("finetune_tiny", 1, str(tmp_path / "first"), json.dumps(shape), "new", "1,1")
    start = f"weights:{tmp_path}/first/zero_1_1/checkpoints/step_00000002"
    shape["changes"] = {"run.seed": 6, "model.decoder.trained_layers": trained_layers}
    _, alone = train_alone(tmp_path / "alone", shape, start)
    settings = tmp_path / "decoder.json"
    settings.write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}')
    shape |= {"micro_batch_size": 4, "deepspeed": str(settings)}
    (copied,) = run_ranks("finetune_tiny", 2, str(tmp_path / "copied"), json.dumps(shape), start, "3,1")
    assert copied["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert copied["drift"] == []


LORA = {
    "model.decoder.adapter": {"kind": "lora", "rank": 3, "alpha": 12},
    "model.encoders.text.adapter": {
        "kind": "lora",
        "rank": 2,
        "targets": ["query_key_value", "feed_forward_in"],
    },
    "model.encoders.image.trained_layers": 1,
}
SCALES = {"decoder/": 4.0, "encoders/": 2.0}
IA3 = {
    "model.decoder.adapter": {"kind": "ia3"},
    "model.encoders.text.adapter": {"kind": "ia3"},
    "model.encoders.image.trained_connector": False,
}


def with_products(weights: Weights) -> Weights:
    """LoRA's products in the weights."""
    whole = dict(weights)
    for name, factor in weights.items():
        if name.endswith(".lora_a"):
            module = name.removesuffix("lora_a")
            scale = next(value for prefix, value in SCALES.items() if name.startswith(prefix))
            whole[f"{module}weight"] = (
                weights[f"{module}weight"] + scale * weights[f"{module}lora_b"] @ factor
            )
    return whole


def with_scales(weights: Weights) -> Weights:
    """IA3's vectors in the weights: of a decoder of 4 and an encoder of 2 heads."""
    whole = dict(weights)
    for name, vector in weights.items():
        if not name.endswith(".ia3"):
            continue
        module = name.removesuffix("ia3")
        weight = weights[f"{module}weight"]
        if module.endswith(("linear_fc2.", "ffn_out.")):
            whole[f"{module}weight"] = weight * vector
            continue
        heads = torch.ones(4, 3, 8) if "linear_qkv" in name else torch.ones(3, 2, 12)
        rows = heads.to(vector)
        if "linear_qkv" in name:  # by head: query, key, value
            rows = torch.cat((rows[:, :1], vector.view(4, 2, 8)), dim=1)
        else:
            rows = torch.cat((rows[:1], vector.view(2, 2, 12)), dim=0)
        whole[f"{module}weight"] = weight * rows.flatten()[:, None]
        whole[f"{module}bias"] = weights[f"{module}bias"] * rows.flatten()
    return whole


@pytest.mark.parametrize(
    ("changes", "options", "merged"), [(LORA, "llama", with_products), (IA3, "paper", with_scales)]
)
def test_adapters_are_the_plain_model_s_on_any_topology_and_after_a_resume(
    changes: dict[str, Any], options: str, merged: Any, tmp_path: Path
) -> None:
    shape = {"tensor": 1, "micro_batch_size": 8, "steps": 4, "options": options, "changes": changes}
    start, alone = train_alone(tmp_path / "alone", shape)
    adapters = {name for name in start if name.endswith((".lora_a", ".lora_b", ".ia3"))}
    trained = adapters | {name for name in start if ".connector." in name}
    if merged is with_products:
        trained |= {name for name in start if "image.layers.1." in name or "image.final_norm" in name}
    else:
        trained -= {name for name in start if "image.connector" in name}
        trained |= {name for name in start if ".image." in name and "connector" not in name}
    losses, weights = plain_training(start, shape, start.keys() - trained, merged=merged)
    assert any("decoder/" in name for name in adapters) and any("encoders/" in name for name in adapters)
    assert all(not torch.equal(start[name], weights[name]) for name in adapters)
    split = {"tensor": 2, "sequence_parallel": True}
    (result,) = run_ranks(
        "finetune_tiny", 2, str(tmp_path / "split"), json.dumps(shape | split), "new", "1,3"
    )
    found = [("alone", alone, 0), ("split", result, 0)]
    if merged is with_products:
        run_ranks("finetune_tiny", 1, str(tmp_path / "few"), json.dumps(shape | {"steps": 2}), "new", "1,1")
        more = shape | {"micro_batch_size": 4, "steps": 2}
        words = f"resume:{tmp_path}/few/zero_1_1/checkpoints/step_00000002"
        (result,) = run_ranks("finetune_tiny", 2, str(tmp_path / "data"), json.dumps(more), words, "3,1")
        found.append(("data", result, 2))
    for name, result, passed in found:
        assert result["losses"] == pytest.approx(losses[passed:], abs=1e-5), name
        assert result["drift"] == []
        assert {f"decoder/{n}" for n in result["may_have_gradients"]["decoder"]} <= adapters
        end = read_weights(tmp_path / name / f"zero_{result['zero'].replace(',', '_')}", 4)
        for parameter, value in weights.items():
            torch.testing.assert_close(end[parameter], value, atol=1e-5, rtol=0)
            assert parameter in trained or torch.equal(end[parameter], start[parameter])


def test_an_adapter_beside_the_weights_of_another_run_starts_where_that_is(tmp_path: Path) -> None:
    shape = {"tensor": 1, "micro_batch_size": 8, "steps": 1}
    _, base = train_alone(tmp_path / "base", shape)
    words = f"weights:{tmp_path}/base/zero_1_1/checkpoints/step_00000000"
    _, adapted = train_alone(tmp_path / "adapted", shape | {"changes": LORA}, words)
    assert adapted["losses"] == pytest.approx(base["losses"], abs=1e-6)
    assert sum(adapted["optimized"].values()) < sum(base["optimized"].values()) / 2
