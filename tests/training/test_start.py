"""What a run starts from is decided before its model is built, and what a checkpoint holds is not drawn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.test_checkpoint import make_checkpoint
from checkpoint.test_damage import rewrite
from distributed.tiny import tiny_config
from metalm.checkpoint.names import list_checkpoints
from metalm.checkpoint.reader import CheckpointReader
from metalm.checkpoint.state import RunFacts
from metalm.config import RunConfig, config_content, write_config
from metalm.data.corpus import Corpus
from metalm.data.tokenizer import load_tokenizer, train_tokenizer
from metalm.errors import CheckpointError, ConfigError
from metalm.model.encoder import EncoderBank, encoder_draw
from metalm.model.initialization import initialize_parameters
from metalm.training import engines as engines_module
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import build_engines
from metalm.training.going_on import check_going_on
from metalm.training.start import decide_start, load_start, tell_readers

OTHER_ENCODER = {"num_layers": 1, "hidden_size": 8, "num_heads": 1, "max_text_positions": 8}


@pytest.fixture(autouse=True)
def _as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DeepSpeed asks of whoever has joined the ranks."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


def weights(engines: Any) -> dict[str, torch.Tensor]:
    return {
        f"{component}/{name}": parameter.detach().clone()
        for component, engine in engines.by_component().items()
        for name, parameter in engine.module.named_parameters()
    }


def config_with(folder: Path, **changes: Any) -> RunConfig:
    """The tiny run with a tokenizer; both ZeRO stages leave parameters whole."""
    if not (folder / "tokenizer").exists():
        train_tokenizer(["the quick brown fox"], 300, folder / "tokenizer")
    stages = {
        "decoder": "deepspeed_configs/decoder_zero1.json",
        "encoders": "deepspeed_configs/encoders_zero1.json",
    }
    content = tiny_config(str(folder), **stages).model_dump(mode="json")
    content["data"]["tokenizer"] = str(folder / "tokenizer")
    content["model"]["vocab_size"] = 300
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = content
        for name in sections:
            section = section[name]
        section[last] = value
    return RunConfig.model_validate(content)


def start_of(corpus: Corpus, topology: Any) -> None:
    run = corpus.config.run
    decide_start(corpus, CheckpointStore(run.folder / run.name, corpus.config, topology))


def dry_start_of(corpus: Corpus, topology: Any) -> None:
    check_going_on(corpus)


def refuse(*arguments: Any) -> Any:
    raise AssertionError("a weight was drawn")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: from then on drawing a weight is an error."""

    def forbid() -> None:
        for name in ("decoder_draw", "encoder_draw"):
            monkeypatch.setattr(engines_module, name, refuse)

    return forbid


def test_a_resumed_run_draws_no_weight_and_covers_all(
    topology: Any, tmp_path: Path, drawn: Callable[[], None]
) -> None:
    config = config_with(tmp_path)
    store = CheckpointStore(tmp_path / "tiny", config, topology)
    first = build_engines(config, topology)
    expected = weights(first)
    store.save(first, 3, {0: "somewhere"}, RunFacts())
    drawn()
    start = decide_start(Corpus(config), store)
    assert start.checkpoint is not None
    assert start.checkpoint.folder == tmp_path / "tiny" / "checkpoints" / "step_00000003"
    second = build_engines(config, topology, start.given)
    assert all(tensor.isnan().all() for tensor in weights(second).values())
    state = load_start(start, config, topology, second)
    assert state is not None and state.step == 3
    found = weights(second)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    on_disk = load_file(start.checkpoint.folder / "encoders" / "rank_00000.safetensors")
    for name in second.encoders.module.state_dict():
        assert torch.equal(found[f"encoders/{name}"].flatten(), on_disk[f"{name}|master"])
    assert start.checkpoint.lane_states() == {0: "somewhere"}


def test_weights_are_drawn_by_the_first_data_parallel_rank_alone(
    topology: Any, tmp_path: Path, drawn: Callable[[], None]
) -> None:
    """The others have no numbers, until DeepSpeed gives them the first rank's: here there is nobody to."""
    config = config_with(tmp_path)
    expected = weights(build_engines(config, topology))
    assert not any(tensor.isnan().any() for tensor in expected.values())
    drawn()
    found = weights(build_engines(config, replace(topology, rank=1, data_rank=1)))
    assert found.keys() == expected.keys()
    assert all(tensor.isnan().all() for tensor in found.values())


def test_weights_are_cast_before_they_are_moved_and_are_the_same(topology: Any, tmp_path: Path) -> None:
    """One parameter at a time, so that nothing is whole in float32 where a run trains in bfloat16."""
    config = config_with(tmp_path).model
    drawn = {}
    for dtype in (torch.float32, torch.bfloat16):
        bank = EncoderBank(config)
        initialize_parameters(
            bank,
            "encoders",
            7,
            lambda name: encoder_draw(config, name),
            0,
            1,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        drawn[dtype] = {name: parameter.detach() for name, parameter in bank.named_parameters()}
    for name, value in drawn[torch.bfloat16].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, drawn[torch.float32][name].bfloat16()), name


def test_what_a_checkpoint_lacks_is_an_error(topology: Any, tmp_path: Path) -> None:
    config = config_with(tmp_path)
    store = CheckpointStore(tmp_path / "tiny", config, topology)
    store.save(build_engines(config, topology), 3, None, RunFacts())
    folder = tmp_path / "tiny" / "checkpoints" / "step_00000003"
    index = json.loads((folder / "encoders" / "index.json").read_text())
    del index["parameters"][min(index["parameters"])]
    rewrite(folder, "encoders/index.json", json.dumps(index).encode())
    start = decide_start(Corpus(config), store)
    engines = build_engines(config, topology, start.given)
    with pytest.raises(CheckpointError, match=r"lacks 1 parameter\(s\), such as encoders"):
        load_start(start, config, topology, engines)


def test_a_new_run_draws_only_what_its_sources_lack(
    topology: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = config_with(tmp_path)
    built = build_engines(source, topology)
    CheckpointStore(tmp_path / "tiny", source, topology).save(built, 3, None, RunFacts())
    content = source.model_dump(mode="json")
    content["run"] |= {"name": "grown", "seed": 77}
    content["model"]["encoders"]["extra"] = content["model"]["encoders"]["text"]
    content["initialize"] = {"encoders": str(tmp_path / "tiny"), "new": ["encoders.extra.*"]}
    config = RunConfig.model_validate(content)
    store = CheckpointStore(tmp_path / "grown", config, topology)
    names: list[str] = []
    draw = engines_module.encoder_draw

    def count(model: Any, name: str, pretrained: Any) -> Any:
        names.append(name)
        return draw(model, name, pretrained)

    monkeypatch.setattr(engines_module, "encoder_draw", count)
    start = decide_start(Corpus(config), store)
    assert start.checkpoint is None
    engines = build_engines(config, topology, start.given)
    assert load_start(start, config, topology, engines) is None
    assert {name.split(".")[1] for name in names} == {"extra"}
    monkeypatch.setattr(engines_module, "encoder_draw", draw)
    fresh, found, before = weights(build_engines(config, topology)), weights(engines), weights(built)
    for name, tensor in found.items():
        is_taken = name in before and name.startswith("encoders/")
        assert torch.equal(tensor, before[name] if is_taken else fresh[name]), name


def test_an_adapter_begins_beside_given_weights_and_is_not_lost_without_a_word(
    topology: Any, tmp_path: Path
) -> None:
    """Nor are positions of another grid of patches, which are fitted."""

    def run(name: str, start: str | None, **changes: Any) -> dict[str, torch.Tensor]:
        sources = (
            {}
            if start is None
            else {component: str(tmp_path / start) for component in ("decoder", "encoders")}
        )
        config = config_with(tmp_path, run__name=name, initialize=sources, **changes)
        store = CheckpointStore(tmp_path / name, config, topology)
        decided = decide_start(Corpus(config), store)
        engines = build_engines(config, topology, decided.given)
        load_start(decided, config, topology, engines)
        store.save(engines, 1, None, RunFacts())
        return weights(engines)

    base = run("base", None)
    finer = {"model__encoders__image__image": {"image_size": 12, "patch_size": 4}}
    lora = {"model__decoder__trained_layers": "none", "model__decoder__adapter": {"rank": 2}}
    adapted = run("adapted", "base", **lora, **finer)
    position = "encoders/encoders.image.image_positions.weight"
    assert adapted.pop(position).shape[0] == 9 and base.pop(position).shape[0] == 4
    new = adapted.keys() - base.keys()
    assert len(new) == 2 * 4 * 2 and all(not adapted[name].any() for name in new if name.endswith("lora_b"))
    assert all(torch.equal(adapted[name], base[name]) for name in base)
    with pytest.raises(
        CheckpointError, match="has an adapter, such as gpt.* give the model the same adapter"
    ):
        run("plain", "adapted", **finer)


@pytest.fixture
def store(topology: Any, tmp_path: Path) -> CheckpointStore:
    """Of a run with a hand-made checkpoint, which `config_with(tmp_path)` describes."""
    config = config_with(tmp_path)
    folder = make_checkpoint(tmp_path / "tiny" / "checkpoints", 4)
    rewrite(folder, "config.yaml", config_content(config, {}))
    state = json.loads((folder / "state.json").read_text())
    state["tokenizer"] = load_tokenizer(config.data.tokenizer).fingerprint
    rewrite(folder, "state.json", json.dumps(state).encode())
    return CheckpointStore(tmp_path / "tiny", config, topology)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("model__decoder__hidden_size", 64, "model.decoder.hidden_size: 32 in the checkpoint, 64 in the"),
        ("model__decoder__activation", "gelu_tanh", "model.decoder.activation: 'gelu' in the checkpoint"),
        ("model__decoder__num_heads", 8, "model.decoder.num_heads: 4 in the checkpoint, 8 in the config"),
        ("model__encoders__text__positions", "rope", "model.encoders.text.positions: 'learned'"),
        ("model__encoders__other", OTHER_ENCODER, "model.encoders.other: absent in the checkpoint, present"),
    ],
)
def test_another_model_is_refused_by_key_before_it_is_built(
    store: CheckpointStore, tmp_path: Path, key: str, value: Any, line: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        decide_start(Corpus(config_with(tmp_path, **{key: value})), store)
    assert line in str(refusal.value)
    assert "another run.name, with initialize.decoder" in str(refusal.value)


def test_another_tokenizer_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    train_tokenizer(["other words than those"], 300, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"data.tokenizer: .*other.* is not the tokenizer that"):
        decide_start(Corpus(config_with(tmp_path, data__tokenizer=str(tmp_path / "other"))), store)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__decoder__recompute", True),
        ("model__decoder__dropout", 0.1),
        ("model__encoders__text__trained_layers", 1),
        ("model__decoder__trained_layers", "none"),
        ("model__encoders__image__trained_connector", False),
        ("training__steps", 7),
        ("training__optimizer__learning_rate", 0.1),
    ],
)
def test_what_leaves_the_weights_their_meaning_may_change(
    store: CheckpointStore, tmp_path: Path, key: str, value: Any
) -> None:
    start = decide_start(Corpus(config_with(tmp_path, **{key: value})), store)
    assert start.checkpoint is not None
    assert start.checkpoint.folder == tmp_path / "tiny" / "checkpoints" / "step_00000004"


def test_what_a_run_is_told_anew_when_it_goes_on_is_logged(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        decide_start(Corpus(config_with(tmp_path)), store)
        assert not caplog.records
        changes = {"training__steps": 7, "parallel__tensor": 2, "monitor__log_every_steps": 5}
        decide_start(Corpus(config_with(tmp_path, **changes)), store)
    (record,) = caplog.records
    assert record.getMessage().splitlines()[1:] == [
        "  parallel.tensor: 1 until then, 2 now",
        "  training.steps: 100 until then, 7 now",
    ]


def test_texts_whose_encoder_the_model_lacks_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_with(tmp_path, data__sources__text__readers={"text": "prosody"})
    with caplog.at_level(logging.INFO):
        tell_readers(config)
        tell_readers(config.model_copy(update={"model": config.model.model_copy(update={"encoders": {}})}))
    said = "source text: the model has no encoder prosody, so the decoder reads the text itself"
    assert [(one.levelname, one.getMessage()) for one in caplog.records[:2]] == [
        ("WARNING", said),
        ("INFO", said),
    ]


@pytest.mark.parametrize("check", [start_of, dry_start_of])
def test_weights_that_were_trained_under_other_keys_are_taken_with_a_warning(
    topology: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, check: Any
) -> None:
    """Their shapes tell nothing of it: heads, positions, ids."""
    source = config_with(tmp_path)
    (tmp_path / "tiny").mkdir()
    write_config(source, tmp_path / "tiny" / "config.yaml", {})
    facts = RunFacts(tokenizer=load_tokenizer(source.data.tokenizer).fingerprint)
    CheckpointStore(tmp_path / "tiny", source, topology).save(build_engines(source, topology), 4, None, facts)
    caplog.clear()
    train_tokenizer(["other words than those"], 300, tmp_path / "other")
    sources = {component: str(tmp_path / "tiny") for component in ("decoder", "encoders")}
    new = {"run__name": "new", "initialize": sources | {"new": ["encoders.other.*"]}}
    changes = {
        "model__decoder__num_heads": 8,
        "model__decoder__dropout": 0.1,
        "model__encoders__text__positions": "rope",
        "model__encoders__other": OTHER_ENCODER,
    }
    check(Corpus(config_with(tmp_path, **new)), topology)
    assert not caplog.records
    check(Corpus(config_with(tmp_path, **new, **changes)), topology)
    decoder, encoders = (record.getMessage() for record in caplog.records)
    found = [line.strip() for line in decoder.splitlines()[1:] + encoders.splitlines()[1:]]
    assert found == [
        "model.decoder.num_heads: 4 in the checkpoint, 8 in the config",
        "model.encoders.text.positions: 'learned' in the checkpoint, 'rope' in the config",
    ]
    caplog.clear()
    afresh = {"run__name": "new", "initialize": sources | {"new": ["encoders.text.connector.*"]}}
    connector = {"model__encoders__text__connector": "feed_forward"}
    check(Corpus(config_with(tmp_path, **afresh, **connector)), topology)
    assert not caplog.records
    check(Corpus(config_with(tmp_path, **new, data__tokenizer=str(tmp_path / "other"))), topology)
    assert all("other is not the checkpoint's: ids mean" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 2
    caplog.clear()
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step_00000004"
    rewrite(checkpoint, "config.yaml", b"model: {vocab_size: 300, decoder: {number_of_layers: 2}}")
    check(Corpus(config_with(tmp_path, **new)), topology)
    assert "initialize.decoder: the config is not compared: " in caplog.text


@pytest.mark.parametrize("check", [start_of, dry_start_of])
@pytest.mark.usefixtures("store")
def test_encoders_that_are_not_there_give_no_weights(topology: Any, tmp_path: Path, check: Any) -> None:
    new = {"run__name": "new", "initialize": {"encoders": str(tmp_path / "tiny")}}
    with pytest.raises(CheckpointError, match=r"has no component 'encoders' \(it has: decoder\)"):
        check(Corpus(config_with(tmp_path, **new)), topology)
    with pytest.raises(CheckpointError, match="the model has no encoders to start from"):
        check(Corpus(config_with(tmp_path, **new, model__encoders={})), topology)


def test_a_config_of_another_version_is_said(store: CheckpointStore, tmp_path: Path) -> None:
    folder = tmp_path / "tiny" / "checkpoints" / "step_00000004"
    rewrite(folder, "config.yaml", b"model: {vocab_size: 300, decoder: {number_of_layers: 2}}")
    with pytest.raises(CheckpointError, match=r"is of another version .*model\.decoder\."):
        decide_start(Corpus(config_with(tmp_path)), store)


def test_a_damaged_newest_is_passed_over_and_a_state_that_does_not_parse_is_damage(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = tmp_path / "tiny" / "checkpoints"
    newest = make_checkpoint(checkpoints, 5)
    rewrite(newest, "state.json", b"[" * 100_000)
    assert store.newest_whole() == checkpoints / "step_00000004"
    assert f"{newest} is passed over" in caplog.text
    assert newest.is_dir()  # until the start is accepted
    store.set_aside_damaged()
    assert list_checkpoints(checkpoints) == [checkpoints / "step_00000004"]
    assert (checkpoints / "step_00000005.damaged").is_dir()
    CheckpointReader(checkpoints / "step_00000004", verify=True)
