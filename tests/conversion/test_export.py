"""Exporting: what is written, whatever layout wrote the checkpoint, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.conftest import Workshop, configs_and_weights, write_run
from distributed.ranks import run_command
from metalm.conversion import checkpoint_source, export, proof
from metalm.conversion.export import export_checkpoint
from metalm.conversion.hf_config import write_configs
from metalm.conversion.plain_transformers import FORBIDDEN
from metalm.data.tokenizer import load_tokenizer, train_tokenizer
from metalm.errors import EXIT_DATA, CheckpointError, ConfigError, DataError
from metalm.objectives.semi_causal import SemiCausal

REPOSITORY = Path(__file__).parents[2]
KIND = "deepnorm"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def nothing_is_left(folder: Path) -> bool:
    return not list(folder.glob("out*"))


@pytest.mark.parametrize(("tensor_size", "zero_size"), [(1, 1), (4, 2)])
def test_every_layout_gives_the_same_bytes(
    workshop: Workshop, tmp_path: Path, tensor_size: int, zero_size: int
) -> None:
    model = workshop.training_model(KIND)
    run = write_run(tmp_path / "run", model, tensor_size=tensor_size, zero_size=zero_size)
    export_checkpoint(run, tmp_path / "out", max_shard_bytes=50_000, with_proof=False)
    assert configs_and_weights(tmp_path / "out") == configs_and_weights(workshop.exported(KIND))


def test_shards_hold_the_size_asked_for_and_their_index_is_right(workshop: Workshop) -> None:
    folder = workshop.exported(KIND)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 5
    for path in files:
        tensors = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == tensors.keys()
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= 50_000
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in weights_of(folder).values())


def test_weights_are_rounded_to_the_dtype_asked_for_and_proved_so(workshop: Workshop, tmp_path: Path) -> None:
    result = export_checkpoint(workshop.run_folder(KIND), tmp_path / "out", dtype=torch.bfloat16)
    assert result.largest_difference is not None and result.largest_difference < 1e-4
    exact = weights_of(workshop.exported(KIND))
    for name, tensor in weights_of(tmp_path / "out").items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16))


def test_padding_rows_of_the_vocabulary_stay_behind(workshop: Workshop) -> None:
    weights = weights_of(workshop.exported(KIND))
    model = workshop.training_model(KIND)
    whole = model.parameters["decoder"]["gpt.embedding.word_embeddings.weight"]
    assert whole.shape[0] > model.config.model.vocab_size
    assert torch.equal(weights["model.embed_tokens.weight"], whole[: model.config.model.vocab_size])


def test_a_wrong_weight_fails_the_proof_and_leaves_no_folder(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic mistake: queries, keys and values taken in three blocks instead of by head."""

    def without_interleaving(self):
        for rule in self.rules:
            whole = self.reader.read(rule.component, rule.name)
            parts = whole.chunk(3) if "linear_qkv" in rule.name else rule.split(whole)
            yield from zip(rule.targets, parts, strict=True)

    monkeypatch.setattr(checkpoint_source.CheckpointSource, "tensors", without_interleaving)
    with pytest.raises(CheckpointError, match=r"not the checkpoint's: text: logits differ by"):
        export_checkpoint(workshop.run_folder(KIND), tmp_path / "out")
    assert nothing_is_left(tmp_path)


def test_a_folder_that_does_not_load_fails_the_proof(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.write_model_code

    def needs_metalm(folder: Path) -> None:
        real(folder)
        path = folder / "modeling_metalm.py"
        path.write_text("from __future__ import annotations\nimport metalm\n" + path.read_text())

    monkeypatch.setattr(export, "write_model_code", needs_metalm)
    with pytest.raises(CheckpointError, match="does not work in transformers"):
        export_checkpoint(workshop.run_folder(KIND), tmp_path / "out")
    assert nothing_is_left(tmp_path)


def test_code_that_forgets_its_cache_fails_the_proof_and_leaves_no_folder(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a whole prompt are right; each later token sees its predecessor alone."""
    real = export.write_model_code

    def forgets(folder: Path) -> None:
        real(folder)
        path = folder / "modeling_metalm.py"
        code = path.read_text()
        assert code.count("cache = _one_cache(cache, past_key_values)\n        if (input_ids") == 1
        path.write_text(
            code.replace(
                "cache = _one_cache(cache, past_key_values)\n        if (input_ids",
                "cache = None\n        if (input_ids",
            )
        )

    monkeypatch.setattr(export, "write_model_code", forgets)
    with pytest.raises(CheckpointError, match=r"cached: generated token \d+ of 24 is \d+, expected \d+"):
        export_checkpoint(workshop.run_folder(KIND), tmp_path / "out")
    assert nothing_is_left(tmp_path)


def test_a_token_that_ties_with_the_most_likely_is_no_mistake() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0 - 0.9 * proof.TIE, 1.0 - 1.1 * proof.TIE]])
    proof.check_generated("text", logits, torch.tensor([1]))
    proof.check_generated("text", logits, torch.tensor([2]))
    with pytest.raises(CheckpointError, match="token 1 of 1 is 3, expected 1"):
        proof.check_generated("text", logits, torch.tensor([3]))


def test_a_full_disk_leaves_no_folder(workshop: Workshop, tmp_path: Path) -> None:
    """As ENOSPC does, a limit on the size of files ends a write in the middle of a weight file."""
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from metalm.conversion.export import export_checkpoint\n"
        "from metalm.errors import ConfigError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except ConfigError as error:\n"
        "    print('REFUSED', error)\n"
    )
    arguments = [str(workshop.run_folder(KIND)), str(tmp_path / "out")]
    code, output = run_command([sys.executable, "-c", program, *arguments], timeout_s=120)
    assert code == 0, output
    assert re.search(r"REFUSED .*out cannot be written: File too large; make room there", output), output
    assert nothing_is_left(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/proc/none/out cannot be written: .*; name another folder"):
        export_checkpoint(tmp_path / "absent", Path("/proc/none/out"))


def test_a_damaged_checkpoint_is_named_and_not_converted(workshop: Workshop, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(workshop.run_folder(KIND), run)
    path = next((run / "checkpoints").glob("step_*/decoder/rank_00001.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"decoder/rank_00001.safetensors is damaged"):
        export_checkpoint(run, tmp_path / "out")
    assert nothing_is_left(tmp_path)


def test_a_checkpoint_without_a_parameter_does_not_fit(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.training_model(KIND)
    decoder = {n: t for n, t in model.parameters["decoder"].items() if "layers.2.mlp_norm.bias" not in n}
    partial = type(model)(model.config, {**model.parameters, "decoder": decoder}, {}, {})
    run = write_run(tmp_path / "run", partial)
    with pytest.raises(CheckpointError, match=r"lacks decoder.gpt.decoder.layers.2.mlp_norm.bias"):
        export_checkpoint(run, tmp_path / "out")
    assert nothing_is_left(tmp_path)


def test_another_tokenizer_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    model = workshop.training_model(KIND)
    other = train_tokenizer(["other words than those"], 280, tmp_path / "other")
    assert other.size <= model.config.model.vocab_size
    run = write_run(tmp_path / "run", model, state={"tokenizer": "0" * 64})
    with pytest.raises(DataError, match="trained with the tokenizer 0000"):
        export_checkpoint(run, tmp_path / "out", tokenizer=tmp_path / "other")
    train_tokenizer([Path(__file__).read_text()], 600, tmp_path / "large")
    with pytest.raises(DataError, match="has 600 ids, the model 330"):
        export_checkpoint(run, tmp_path / "out", tokenizer=tmp_path / "large")
    assert nothing_is_left(tmp_path)


def test_image_encoders_of_different_sizes_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    """The processor prepares images for all of a batch alike, before it knows who reads them."""
    config = workshop.training_model(KIND).config
    vision = config.model.encoders["vision"]
    image = vision.image.model_copy(update={"image_size": 24})
    encoders = {**config.model.encoders, "finer": vision.model_copy(update={"image": image})}
    config = config.model_copy(update={"model": config.model.model_copy(update={"encoders": encoders})})
    with pytest.raises(ConfigError, match=r"different sizes \(\[16, 24\]\) cannot be exported"):
        write_configs(config, load_tokenizer(workshop.tokenizer_folder), torch.float32, tmp_path)


def test_an_existing_folder_is_not_touched(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_checkpoint(workshop.run_folder(KIND), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_tool_ends_with_one_message_and_the_kinds_exit_code(workshop: Workshop, tmp_path: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_to_hf.py")]
    run = str(workshop.run_folder(KIND))
    code, output = run_command([*tool, str(tmp_path), str(tmp_path / "out")], timeout_s=60)
    assert code == EXIT_DATA
    assert "neither a checkpoint nor a run folder" in output and "Traceback" not in output
    code, output = run_command([*tool, run, str(tmp_path / "out"), "--no-proof"], timeout_s=60)
    assert code == 0, output
    assert "Converted without proof" in (tmp_path / "out" / "README.md").read_text()


def test_a_modality_that_the_shipped_code_does_not_read_is_refused_before_anything_is_written(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_source, "SHIPPED_MODALITIES", ("text", "audio"))
    with pytest.raises(ConfigError, match="encoder vision reads image, which the code of exported"):
        export_checkpoint(workshop.run_folder(KIND), tmp_path / "absent" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "modules",
    [
        "metalm.conversion.export",
        "metalm.tasks.task_file, metalm.tasks.ways, metalm.conversion.export_answerer",
    ],
    ids=["convert", "evaluate-tasks"],
)
def test_what_converts_and_asks_an_export_imports_neither_deepspeed_nor_megatron(modules: str) -> None:
    program = f"import sys, {modules}; print({{'deepspeed', 'megatron'}} & sys.modules.keys())"
    code, output = run_command([sys.executable, "-c", program], timeout_s=60)
    assert code == 0 and output.splitlines()[-1] == "set()", output


def test_the_folder_serves_where_there_is_only_transformers(workshop: Workshop, tmp_path: Path) -> None:
    """The model card's own snippet, in a process that cannot import this package, DeepSpeed or Megatron."""
    folder = workshop.exported(KIND)
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    program = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in FORBIDDEN) + snippet[1]
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=folder.parent,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_the_card_has_the_figures_of_run_and_proof(workshop: Workshop) -> None:
    card = (workshop.exported(KIND) / "README.md").read_text()
    for figure in (
        "| Steps | 200 of 5,000 |",
        "| Trained positions | 12,345 |",
        "tensor 2 x data 3",
        "| abc |",
    ):
        assert figure in card
    assert len(re.findall(r"\| (?:text|image).*e-0\d|\| (?:text|image).*0\.00e\+00", card)) == 3


def test_the_card_has_held_out_losses_in_the_unit_of_the_objective(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", workshop.training_model(KIND))
    (run / "evaluation.json").write_text(json.dumps({"step": 200, "losses": {"books": 1.5}}))
    monkeypatch.setattr(SemiCausal, "loss_unit", "bits per byte")
    export_checkpoint(run, tmp_path / "out", with_proof=False)
    assert "| Held-out loss, books | 1.5000 bits per byte |" in (tmp_path / "out" / "README.md").read_text()


def test_proof_prompts_reach_every_encoder(workshop: Workshop) -> None:
    source = checkpoint_source.open_checkpoint(workshop.run_folder(KIND))
    cases = proof.proof_cases(source)
    assert [set(case.row.spans) for case in cases] == [set(), {"vision"}, {"text"}]
    lengths = [spans.num_patches.tolist() for case in cases for spans in case.row.spans.values()]
    assert lengths == [[4], [0]]
