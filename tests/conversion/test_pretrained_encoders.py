"""Exports of models whose encoders are those of transformers, beside one of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor

from conversion.conftest import TrainingModel, Workshop, write_run
from metalm.checkpoint.reader import CheckpointReader
from metalm.config import RunConfig
from metalm.config.pretrained_folder import fill_in_pretrained
from metalm.conversion.chat import chat_with_folder
from metalm.conversion.export import export_checkpoint
from metalm.conversion.generate import FolderModel
from metalm.conversion.restore import restore_checkpoint
from metalm.errors import ConfigError, DataError
from metalm.model.pretrained import PretrainedEncoder, load_weights
from reference.encoder_tokenizer import save_tokenizer
from reference.pretrained import AUDIO, save_pretrained

PAIRS = [("roberta", "vit"), ("electra", "siglip"), ("xlm-roberta", "beit"), ("bert", "clip")]
SAMPLES = tuple(kind for kind in AUDIO if kind != "ast")
"""Kinds that read samples, in clips of any length."""
PROMPTS = {
    "text": "the quick <span:reader>brown fox</span> jumps",
    "image": "a <span:viewer><image></span> of",
    "both": "<span:viewer><image></span>the <span:reader>lazy dog</span> and <span:text>a fox</span>",
}


def write_docked_run(workshop: Workshop, folder: Path, names: dict[str, str]) -> Path:
    """The run of a small decoder with encoders of transformers, by name and kind, instead of its images'."""
    base = workshop.training_model("llama")
    content = base.config.model_dump(mode="json")
    encoders = content["model"]["encoders"]
    gone = [name for name, encoder in encoders.items() if encoder["image"]]
    for name in gone:
        del encoders[name]
    content["data"]["sources"] = {
        name: source
        for name, source in content["data"]["sources"].items()
        if not set(source["readers"].values()) & set(gone)
    }
    for name, kind in names.items():
        save_pretrained(kind, folder / kind)
        connector = "feed_forward" if name == "viewer" else "linear"
        own = {"path": str(folder / kind)} | ({"clip_seconds": 0.05} if kind in SAMPLES else {})
        encoders[name] = {"pretrained": own, "connector": connector}
    fill_in_pretrained(content)
    config = RunConfig.model_validate(content)
    kept = tuple(f"encoders.{name}." for name in encoders)
    parameters = {n: p for n, p in base.parameters["encoders"].items() if n.startswith(kept)}
    torch.manual_seed(3)
    for name in names:
        encoder = PretrainedEncoder(config.model.encoders[name], config.model.decoder.hidden_size)
        encoder.model.load_state_dict(load_weights(config.model.encoders[name]), strict=False)
        parameters |= {f"encoders.{name}.{n}": p.detach().clone() for n, p in encoder.named_parameters()}
    model = TrainingModel(config, {**base.parameters, "encoders": parameters}, {}, {})
    return write_run(folder / "run", model)


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(pair))
def docked(
    request: pytest.FixtureRequest, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run and its export."""
    text, image = request.param
    folder = tmp_path_factory.mktemp("docked")
    (folder / text).mkdir()
    save_tokenizer(folder / text)
    run = write_docked_run(workshop, folder, {"reader": text, "viewer": image})
    result = export_checkpoint(run, folder / "out", max_shard_bytes=50_000)
    assert {proof.name for proof in result.proof} >= {
        "text with a span of reader",
        "image and text of viewer",
    }
    assert result.largest_difference is not None and result.largest_difference < 1e-4
    return run, folder / "out"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def test_batched_prompts_give_the_tokens_of_each_alone(docked: tuple[Path, Path], tmp_path: Path) -> None:
    """Through a processor that was saved again, with encoders of transformers on either side of ours."""
    _, out = docked
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
    AutoProcessor.from_pretrained(out, trust_remote_code=True).save_pretrained(tmp_path / "again")
    processor = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    images = {"text": [], "image": [picture(1)], "both": [picture(2)]}
    alone = []
    for name, prompt in PROMPTS.items():
        inputs = processor(text=prompt, images=images[name] or None)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        alone.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    inputs = processor(text=list(PROMPTS.values()), images=list(images.values()))
    together = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    start = inputs["input_ids"].shape[1]
    pad = processor.tokenizer.pad_token_id
    assert [[t for t in row if t != pad] for row in together[:, start:].tolist()] == [
        [t for t in row if t != pad] for row in alone
    ]


def test_what_an_encoder_reads_changes_the_answer(docked: tuple[Path, Path]) -> None:
    _, out = docked
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)

    def last_logits(text: str, *images: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return model(**processor(text=text, images=list(images) or None)).logits[0, -1]

    one, other = (last_logits(PROMPTS["image"], picture(seed)) for seed in (1, 2))
    assert (one - other).abs().max() > 1e-3
    one, other = (last_logits(f"a <span:reader>{words}</span> b") for words in ("the fox", "the dog"))
    assert (one - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="encoder 'viewer' reads at most 0 tokens, a span has"):
        processor(text="<span:viewer><image>words</span>", images=[picture(1)])


def test_a_folder_answers_to_spans_and_pictures_without_running_its_code(
    docked: tuple[Path, Path], tmp_path: Path
) -> None:
    _, out = docked
    Image.fromarray(picture(1)).save(tmp_path / "picture.png")
    model = FolderModel(out)
    assert isinstance(model.generate(PROMPTS["text"], max_new_tokens=4), str)
    assert isinstance(model.generate("It is", [tmp_path / "picture.png"], max_new_tokens=4), str)
    said: list[str] = []
    turns = ["/image " + str(tmp_path / "picture.png"), "a fox", "a dog"]
    chat_with_folder(out, iter(turns), said.append, max_new_tokens=4)
    assert len(said) == 2 and not any(answer.startswith("error") for answer in said)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    prompt = model.chat_prompt([{"role": "user", "content": content}])
    assert prompt == "<image><image><span>what?</span>"
    shutil.copytree(out, tmp_path / "damaged")
    larger = Tokenizer.from_file(str(out / "tokenizer_of_reader.json"))
    larger.add_tokens([f"new {number}" for number in range(200)])
    larger.save(str(tmp_path / "damaged" / "tokenizer_of_reader.json"))
    with pytest.raises(ConfigError, match="more than its encoder"):
        FolderModel(tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer_of_reader.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_of_reader\.json is no tokenizer"):
        FolderModel(tmp_path / "damaged")


def test_weights_in_bfloat16_are_proved_and_used(docked: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = docked
    result = export_checkpoint(run, tmp_path / "out", dtype=torch.bfloat16)
    assert result.largest_difference is not None and result.largest_difference < 1e-4
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        logits = model(**processor(text=PROMPTS["both"], images=[picture(1)])).logits
    assert logits.isfinite().all()


def test_there_and_back_is_the_same_checkpoint(docked: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = docked
    before = CheckpointReader(run / "checkpoints" / "step_00000200", verify=True)
    config = RunConfig.model_validate(
        workshop_content(run) | {"run": {"name": "back", "folder": str(tmp_path)}}
    )
    after = CheckpointReader(restore_checkpoint(out, config), verify=True)
    for component in before.components():
        assert before.parameters(component) == after.parameters(component)
        for name in before.parameters(component):
            own, back = before.read(component, name), after.read(component, name)
            if "word_embeddings" in name or "output_layer" in name or "token_embedding" in name:
                own, back = own[:330], back[:330]  # rows that pad the vocabulary stay behind
            torch.testing.assert_close(own, back, atol=0, rtol=0)


def workshop_content(run: Path) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load((run / "checkpoints" / "step_00000200" / "config.yaml").read_text())
    content.pop("provenance")
    return content


def test_a_text_encoder_without_its_tokenizer_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    run = write_docked_run(workshop, tmp_path, {"reader": "bert"})
    with pytest.raises(DataError, match=r"tokenizer.json does not exist, but spans of text need it"):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
