"""Decoders of other families: transformers' own logits, at any tensor parallelism, and exported again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from distributed.ranks import run_command
from metalm.checkpoint.reader import CheckpointReader
from metalm.config import load_config
from metalm.conversion import foreign_decoders
from metalm.conversion.foreign_decoders import read_foreign_decoder
from metalm.conversion.hf_config import model_config
from metalm.conversion.import_decoder import import_decoder
from metalm.conversion.mapping import conversion_rules
from metalm.conversion.reference import reference_logits
from metalm.conversion.shipped.configuration_metalm import MetaLMConfig
from metalm.conversion.shipped.modeling_metalm import MetaLMForConditionalGeneration
from metalm.data.collate import collate
from metalm.data.row import Row
from metalm.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from metalm.errors import EXIT_USAGE, CheckpointError, ConfigError, DataError
from reference.rows import loss_weights

REPOSITORY = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "programs" / "imported_logits.py"
VOCABULARY = 270
LENGTH = 32
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX = {
    "vocab_size": VOCABULARY + 30,  # rows beyond the tokenizer's tokens, as Pythia has
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=3),
    "llama": LlamaConfig(**_LLAMA, rope_parameters=_LLAMA3_ROPE),
    "llama_biases": LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**_LLAMA | {"head_dim": 12}, sliding_window=40),
    "qwen2": Qwen2Config(**{k: v for k, v in _LLAMA.items() if k != "head_dim"}, tie_word_embeddings=True),
    "pythia": GPTNeoXConfig(**_NEOX, rope_parameters={"rope_theta": 900.0, "partial_rotary_factor": 0.25}),
    "neox_in_series": GPTNeoXConfig(
        **_NEOX,
        use_parallel_residual=False,
        hidden_act="gelu_fast",
        layer_norm_eps=1e-3,
        tie_word_embeddings=True,
    ),
    "olmo": OlmoConfig(**{k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "gemma": GemmaConfig(**_LLAMA | {"head_dim": 12}, rms_norm_eps=1e-3),
}
PIPELINE = """
extends: [{imported}]
run: {{name: imported, folder: {folder}}}
data: {{sequence_length: {length}, sources: {{text: {{path: unused}}}}}}
training:
  {{steps: 10, global_batch_size: 64, micro_batch_size: 1, precision: fp32, schedule: {{warmup_steps: 1}}}}
"""


def rows() -> list[list[list[int]]]:
    """Two documents packed in one row, and one in another."""
    draw = torch.Generator().manual_seed(1)
    return [
        [torch.randint(VOCABULARY, (size,), generator=draw).tolist() for size in sizes]
        for sizes in ((11, 17), (30,))
    ]


def write_tokenizer(folder: Path) -> None:
    """Of another family: byte-level, with one special token of its own."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    model.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models as transformers saves them, by name."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # so that norms and biases matter
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        model.save_pretrained(folder / name, max_shard_size="40KB")
        write_tokenizer(folder / name)
    _save_as_old_transformers_did(folder / "gpt2")
    _save_as_pythia_was(folder / "pythia")
    return folder


def _save_as_pythia_was(folder: Path) -> None:
    """GPT-NeoX as transformers saved it before version 5, with the keys and buffers of that time."""
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    weights["embed_out.weight"] = weights.pop("lm_head.weight", weights.get("embed_out.weight"))
    buffers = {"attention.bias": 64, "attention.masked_bias": 1, "attention.rotary_emb.inv_freq": 1}
    weights |= {f"gpt_neox.layers.0.{name}": torch.ones(size) for name, size in buffers.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    (folder / "config.json").write_text(json.dumps(config))


def _save_as_old_transformers_did(folder: Path) -> None:
    """GPT-2 as the hub has it: names without prefix, and the causal mask among the weights."""
    weights: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 40, 40) for layer in range(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def pipelines(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of runs that start from the models, as a user writes them."""
    folder = tmp_path_factory.mktemp("imported")
    written = {}
    for name in CONFIGS:
        result = import_decoder(models / name, folder / name)
        written[name] = folder / f"{name}.yaml"
        written[name].write_text(PIPELINE.format(imported=result.pipeline, folder=folder, length=LENGTH))
    return written


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_are_those_of_transformers(
    models: Path, pipelines: dict[str, Path], tensor: int, tmp_path: Path
) -> None:
    paths = json.dumps({name: str(path) for name, path in pipelines.items()})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(tensor)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(PROGRAM)]
    code, output = run_command([*command, str(tmp_path / "logits"), paths, json.dumps(rows())], 280)
    assert code == 0, output[-4000:]
    found = load_file(tmp_path / "logits")
    for name in CONFIGS:
        model = AutoModelForCausalLM.from_pretrained(models / name).eval()
        for number, documents in enumerate(rows()):
            with torch.no_grad():
                expected = [model(torch.tensor([document])).logits[0] for document in documents]
            logits = torch.cat(expected)
            own = found[f"{name}/{number}"][:, : logits.shape[1]]
            known = _trained(logits.shape[1])
            assert _distance(own[:, known], logits[:, known]) < 3e-6, name


def _trained(vocab_size: int) -> torch.Tensor:
    """Which logits are of the foreign tokenizer's tokens; new tokens take rows that were never trained."""
    known = torch.ones(vocab_size, dtype=torch.bool)
    known[VOCABULARY : VOCABULARY + len(SPECIAL_TOKENS)] = False
    return known


def _distance(own: torch.Tensor, expected: torch.Tensor) -> float:
    return float((own - expected).norm() / expected.norm())


def exported_model(pipeline: Path, dtype: torch.dtype = torch.float32) -> MetaLMForConditionalGeneration:
    """An imported decoder as an export has it."""
    config = load_config(pipeline)
    assert config.initialize.decoder is not None
    reader = CheckpointReader(config.initialize.decoder / "checkpoints" / "step_00000000")
    content = model_config(config, load_tokenizer(config.data.tokenizer), torch.float32)
    model = MetaLMForConditionalGeneration(MetaLMConfig(**content)).eval()
    weights: dict[str, torch.Tensor] = {}
    for rule in conversion_rules(config.model):
        parts = rule.split(reader.read("decoder", rule.name))
        weights |= dict(zip(rule.targets, parts, strict=True))
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown and missing == (["lm_head.weight"] if config.model.decoder.tied_output else [])
    return model.to(dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_continues_texts_as_the_family_does(
    models: Path, pipelines: dict[str, Path], name: str
) -> None:
    """Also as the proof of an export computes it, and step by step with a cache."""
    ours, theirs = exported_model(pipelines[name]), AutoModelForCausalLM.from_pretrained(models / name).eval()
    config = load_config(pipelines[name])
    reader = CheckpointReader(config.initialize.decoder / "checkpoints" / "step_00000000")
    (document,) = rows()[1]
    row = Row(np.array(document, np.int32), loss_weights(LENGTH - 2, [LENGTH - 2], []), [LENGTH - 2])
    batch = collate([row], model_config=config.model, sequence_length=LENGTH, tp_size=1, pad_id=0)
    proof = reference_logits(config.model, reader.read, batch)[0, : LENGTH - 2]
    tokens = torch.tensor([document])
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
        known = _trained(expected.shape[1]).nonzero()[:, 0]
        for found in (ours(tokens).logits[0], proof):
            assert _distance(found[:, known], expected[:, known]) < 3e-6
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    start, new = tokens[:, :9], set(range(ours.config.vocab_size)) - set(known.tolist())
    continued = [
        model.generate(start, bad_words_ids=[[id_] for id_ in new if id_ < size] or None, **settings)
        for model, size in ((ours, ours.config.vocab_size), (theirs, expected.shape[1]))
    ]
    assert continued[0].tolist() == continued[1].tolist()


def test_the_first_gemmas_gelu_is_meant_as_its_tanh_form(models: Path, tmp_path: Path) -> None:
    shutil.copy(models / "gemma" / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert read_foreign_decoder(tmp_path, set()).decoder.activation == "geglu_tanh"


def test_embeddings_of_gemma_are_scaled_as_bf16_has_the_factor(
    models: Path, pipelines: dict[str, Path]
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(models / "gemma", dtype=torch.bfloat16)
    ours = exported_model(pipelines["gemma"], torch.bfloat16)
    tokens = torch.arange(VOCABULARY)[None]
    with torch.no_grad():
        found, expected = (m(tokens, output_hidden_states=True).hidden_states[0] for m in (ours, theirs))
    assert torch.equal(found, expected)
    exact = theirs.get_input_embeddings().weight[:VOCABULARY] * 32**0.5
    assert not torch.equal(exact, expected[0])


def test_the_checkpoint_holds_weights_alone(pipelines: dict[str, Path]) -> None:
    config = load_config(pipelines["llama"])
    assert config.initialize.decoder is not None
    reader = CheckpointReader(config.initialize.decoder / "checkpoints" / "step_00000000", verify=True)
    assert reader.components() == ["decoder"]
    assert {reader.states("decoder", name) for name in reader.parameters("decoder")} == {("master",)}


def test_the_tokenizer_comes_along_with_our_special_tokens(models: Path, pipelines: dict[str, Path]) -> None:
    config = load_config(pipelines["qwen2"])
    tokenizer = load_tokenizer(config.data.tokenizer)
    before = tokenizers.Tokenizer.from_file(str(models / "qwen2" / "tokenizer.json"))
    text = "the lazy dog, and </d> spelt out"
    assert tokenizer.encode([text])[0].tolist() == before.encode(text).ids
    new = range(before.get_vocab_size(), before.get_vocab_size() + len(SPECIAL_TOKENS))
    assert list(tokenizer.special_ids) == list(new)
    assert config.model.vocab_size == VOCABULARY + len(SPECIAL_TOKENS)


def test_new_embeddings_start_as_what_meant_the_same(models: Path, pipelines: dict[str, Path]) -> None:
    config = load_config(pipelines["llama"])
    tokenizer = load_tokenizer(config.data.tokenizer)
    assert config.initialize.decoder is not None
    reader = CheckpointReader(config.initialize.decoder / "checkpoints" / "step_00000000")
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    newline = tokenizers.Tokenizer.from_file(str(models / "llama" / "tokenizer.json")).encode("\n\n").ids
    tables = {"gpt.embedding.word_embeddings": model.model.embed_tokens, "gpt.output_layer": model.lm_head}
    for name, module in tables.items():
        own, old = reader.read("decoder", f"{name}.weight"), module.weight.detach()
        assert torch.equal(own[:VOCABULARY], old)
        assert torch.equal(own[tokenizer.start_id], old[1])
        assert torch.equal(own[tokenizer.document_id], old[2])
        torch.testing.assert_close(own[tokenizer.paragraph_id], old[newline].mean(dim=0))
        torch.testing.assert_close(own[tokenizer.pad_id], old.mean(dim=0))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = yarn"),
        ("llama", {"attention_bias": True}, "attention_bias = True with mlp_bias = False"),
        ("llama", {"hidden_act": "relu"}, "hidden_act = relu"),
        ("pythia", {"hidden_act": "relu"}, "hidden_act = relu"),
        ("pythia", {"attention_bias": False}, "attention_bias = False beside a feed-forward with biases"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("olmo", {"attention_bias": True}, "attention_bias = True beside a feed-forward without"),
        ("gemma", {"hidden_activation": "silu"}, "hidden_act = silu"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma", {"model_type": "gemma2"}, "attn_logit_softcapping and final_logit_softcapping cap"),
        ("gemma", {"model_type": "gemma3_text"}, "rms_norm_eps is of four norms in each layer"),
        ("olmo", {"model_type": "olmo2"}, "norms behind attention and feed-forward"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (
            "gpt2",
            {"model_type": "gptj"},
            "is of the type 'gptj'; decoders are imported from gpt2, llama, mistral, "
            "qwen2, gpt_neox, olmo, gemma",
        ),
    ],
)
def test_what_the_decoder_cannot_do_is_named(
    models: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(models / name, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError) as caught:
        import_decoder(tmp_path / "model", tmp_path / "out")
    assert message in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_config_that_says_less_than_was_known_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if transformers had renamed a key: what the model asks for would be missed."""
    monkeypatch.setitem(foreign_decoders._NAMED, "mistral", ("sliding_window", "window_of_old"))
    with pytest.raises(ConfigError, match="has no window_of_old in a config of type mistral"):
        import_decoder(models / "mistral", tmp_path / "out")


def test_missing_and_unknown_weights_are_named(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "gpt2", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["h.0.attn.adapter"] = weights.pop("h.1.ln_2.bias")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks h\.1\.ln_2\.bias\n.*holds h\.0\.attn\.adapter"):
        import_decoder(tmp_path / "model", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_cannot_be_written_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/proc/none/out cannot be written: .*; name another folder"):
        import_decoder(tmp_path, Path("/proc/none/out"))


def test_a_name_of_the_hub_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder gpt2: download .* --local-dir gpt2`"):
        import_decoder(Path("gpt2"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_tokenizer_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "gpt2", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        import_decoder(tmp_path / "model", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_tool_says_how_to_go_on(models: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "import_decoder.py"), str(models / "mistral")]
    code, output = run_command([*tool, str(tmp_path / "out")], timeout_s=120)
    assert code == 0 and f"extends: {tmp_path / 'out' / 'decoder.yaml'}" in output
    assert "for 40 positions" in output  # the sliding window
    written = yaml.safe_load((tmp_path / "out" / "decoder.yaml").read_text())
    assert written["initialize"] == {"decoder": str(tmp_path / "out")}
    code, output = run_command([*tool, str(tmp_path / "out")], timeout_s=120)
    assert code == EXIT_USAGE and "exists already" in output
