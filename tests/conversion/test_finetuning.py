"""Training the exported model in transformers: loss, recomputation, LoRA, fresh weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from conversion.cases import PROMPTS, prompt_images, prompt_text, run_config
from conversion.conftest import Workshop
from metalm.checkpoint.reader import CheckpointReader
from metalm.conversion.mapping import conversion_rules
from metalm.conversion.restore import restore_checkpoint

KIND = "deepnorm"


@pytest.fixture
def model(workshop: Workshop) -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(workshop.hf_model(KIND))


@pytest.fixture
def inputs(workshop: Workshop) -> Any:
    names = ("span", "image and prefix", "images and spans", "text in the image encoder")
    return workshop.processor(KIND)(
        text=[prompt_text(PROMPTS[name]) for name in names],
        images=[prompt_images(PROMPTS[name]) for name in names],
        padding_side="right",
    )


def labels_of(inputs: Any) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels.masked_fill(inputs["span_numbers"] > 0, -100)


def test_the_loss_is_the_mean_over_labelled_tokens(model, inputs) -> None:
    labels = labels_of(inputs)
    outputs = model(**inputs, labels=labels)
    losses = functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    assert torch.allclose(outputs.loss, losses.sum() / (labels[:, 1:] != -100).sum())


def test_recomputation_changes_no_gradient(model, inputs) -> None:
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.model.layers[0].gradient_checkpointing
            assert model.model.encoders["vision"].layers[0].gradient_checkpointing
        model.train()
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_every_weight_learns_and_none_of_the_padding(model, inputs) -> None:
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    padded = {key: value for key, value in inputs.items()}
    padded["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
    with torch.no_grad():
        first, second = model(**inputs).logits, model(**padded).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(first[real], second[real])


def test_hidden_states_and_attention_can_be_seen(model, inputs) -> None:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    rows, length = inputs["input_ids"].shape
    config = model.config
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    assert [a.shape for a in outputs.attentions] == [
        (rows, config.num_attention_heads, length, length)
    ] * config.num_hidden_layers
    above = torch.ones(length, length).triu(1).bool()
    assert all(not attention[:, :, above].any() for attention in outputs.attentions)


def test_fresh_weights_are_those_of_deepnorm(model) -> None:
    fresh = type(model)(model.config)
    layers = model.config.num_hidden_layers
    query, value = (
        torch.stack([getattr(layer.self_attn, name).weight for layer in fresh.model.layers]).std().item()
        for name in ("q_proj", "v_proj")
    )
    assert query / value == pytest.approx((8 * layers) ** 0.25, rel=0.05)
    embedding = fresh.model.embed_tokens.weight
    assert embedding.std().item() == pytest.approx(model.config.hidden_size**-0.5, rel=0.05)
    assert fresh.lm_head.weight is embedding


def test_lora_trains_merges_and_comes_back(workshop: Workshop, model, inputs, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modules = ["q_proj", "v_proj", "up_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(**inputs, labels=labels_of(inputs)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**inputs).logits
    generated = adapted.generate(**inputs, max_new_tokens=4, do_sample=False)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(merged.generate(**inputs, max_new_tokens=4, do_sample=False), generated)

    merged.save_pretrained(tmp_path / "merged")
    workshop.processor(KIND).save_pretrained(tmp_path / "merged")
    config = run_config(KIND, workshop.tokenizer_folder)
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": tmp_path})})
    reader = CheckpointReader(restore_checkpoint(tmp_path / "merged", config))
    weights, changed = merged.state_dict(), set()
    for rule in conversion_rules(config.model):
        for name, tensor in zip(
            rule.targets, rule.split(reader.read(rule.component, rule.name)), strict=True
        ):
            assert torch.equal(tensor, weights[name])
            if not torch.equal(tensor, before[name]):
                changed.add(name.split(".")[-2])
    assert changed == set(modules)


def test_trainer_evaluates_predicts_and_finds_its_best(model, inputs, tmp_path: Path) -> None:
    batch = dict(inputs) | {"labels": labels_of(inputs)}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            disable_tqdm=True,
        ),
        train_dataset=[{}] * 8,
        eval_dataset=[{}] * 8,
        data_collator=lambda _: dict(batch),
    )
    with torch.no_grad():
        before = float(model.eval()(**batch).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert trainer.state.best_metric < before
    predicted = trainer.predict([{}] * 8)
    assert predicted.predictions.shape == (4, *inputs["input_ids"].shape[1:], model.config.vocab_size)
    assert (predicted.label_ids == batch["labels"].numpy()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_with_joint_layers_runs_under_autocast(model, inputs, dtype: torch.dtype) -> None:
    exact = model(**inputs, labels=labels_of(inputs)).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**inputs, labels=labels_of(inputs)).loss
    loss.backward()
    assert float(loss) == pytest.approx(float(exact), rel=0.02)
