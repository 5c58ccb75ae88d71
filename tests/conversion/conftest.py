"""A small training model, its checkpoints cut as ranks cut them, and exported folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from built_once import built_once
from conversion.cases import KINDS, run_config
from distributed.ranks import run_program
from metalm.checkpoint.format import STATES, ParameterIndex, Piece, piece_name, rank_file, write_index
from metalm.checkpoint.manifest import publish, record_file, write_manifest
from metalm.checkpoint.names import step_folder
from metalm.config import RunConfig, write_config
from metalm.conversion.export import export_checkpoint
from metalm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

PROGRAM = Path(__file__).parent / "programs" / "training_model.py"
PROOF_FILES = {"README.md", "proof.json"}
"""What of an exported folder depends on the run and on whether there was a proof."""
SHARDED = {
    "word_embeddings": 0,
    "output_layer": 0,
    "linear_qkv": 0,
    "linear_fc1": 0,
    "linear_proj": 1,
    "linear_fc2": 1,
}

ADAPTER_CUTS = {"lora_a": (None, 1), "lora_b": (0, None), "ia3": (0, 0)}
"""Dimension in which an adapter's parameter is cut, beside a weight cut by rows or by columns."""


@dataclass(frozen=True)
class TrainingModel:
    """What the program answered."""

    config: RunConfig
    parameters: dict[str, dict[str, Tensor]]  # by component and name
    logits: dict[str, Tensor]  # by prompt, [tokens, vocabulary]
    greedy: dict[str, list[int]]  # by prompt


class Workshop:
    """Makes what the tests of all worker processes share, each thing once, by the decoder's kind."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        text = "the quick brown fox jumps over the lazy dog. " * 20
        self.tokenizer_folder = built_once(
            factory, "tokenizer", lambda folder: train_tokenizer([text], 300, folder)
        )

    @cache  # noqa: B019
    def training_model(self, kind: str) -> TrainingModel:
        def answer(out: Path) -> None:
            code, output = run_program(
                [str(PROGRAM), kind, str(self.tokenizer_folder), str(out)], timeout_s=120
            )
            assert code == 0, output

        answers = load_file(built_once(self._factory, f"{kind}.safetensors", answer))
        parameters: dict[str, dict[str, Tensor]] = {}
        for key, tensor in answers.items():
            if key.startswith("parameter/"):
                _, component, name = key.split("/")
                parameters.setdefault(component, {})[name] = tensor
        return TrainingModel(
            run_config(kind, self.tokenizer_folder),
            parameters,
            {key[7:]: tensor for key, tensor in answers.items() if key.startswith("logits/")},
            {key[7:]: tensor.tolist() for key, tensor in answers.items() if key.startswith("greedy/")},
        )

    @cache  # noqa: B019
    def run_folder(self, kind: str) -> Path:
        model = self.training_model(kind)
        return built_once(self._factory, f"run_{kind}", lambda folder: write_run(folder, model))

    @cache  # noqa: B019
    def exported(self, kind: str) -> Path:
        """In several files, proved."""
        run = self.run_folder(kind)
        return built_once(
            self._factory,
            f"exported_{kind}",
            lambda folder: export_checkpoint(run, folder, max_shard_bytes=50_000),
        )

    @cache  # noqa: B019
    def hf_model(self, kind: str) -> Any:
        path = self.exported(kind)
        return AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True).eval()

    @cache  # noqa: B019
    def processor(self, kind: str) -> Any:
        return AutoProcessor.from_pretrained(self.exported(kind), trust_remote_code=True)


def configs_and_weights(folder: Path) -> dict[str, bytes]:
    """The files of an exported folder but for its proof."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in PROOF_FILES}
    config = json.loads(files["config.json"])
    config.pop("proved_on_transformers", None)
    return files | {"config.json": json.dumps(config).encode()}


def write_run(
    folder: Path,
    model: TrainingModel,
    *,
    tensor_size: int = 2,
    zero_size: int = 3,
    state: dict[str, Any] | None = None,
) -> Path:
    """A run folder with one checkpoint, cut over TP ranks and then over ZeRO ranks."""
    partial = step_folder(folder / "checkpoints", 200).with_suffix(".partial")
    for component, parameters in model.parameters.items():
        (partial / component).mkdir(parents=True)
        size = tensor_size if component == "decoder" else 1
        gated = component == "decoder" and model.config.model.decoder.activation == "swiglu"
        write_component(partial / component, parameters, size, zero_size, gated=gated)
    content = {
        "step": 200,
        "progress": {"trained_tokens": 12345.0},
        "topology": {"tensor": tensor_size, "data": zero_size},
        "zero_stages": {name: 1 if name == "decoder" else 3 for name in model.parameters},
        "optimizer_steps": dict.fromkeys(model.parameters, 200.0),
        "engine_counters": {name: {"global_steps": 200, "skipped_steps": 0} for name in model.parameters},
        **(state or {}),
    }
    (partial / "state.json").write_text(json.dumps(content))
    write_config(model.config, partial / "config.yaml", {"commit": "abc", "versions": {"torch": "2"}})
    files = [path for path in partial.rglob("*") if path.is_file()]
    write_manifest(partial, {str(path.relative_to(partial)): record_file(path) for path in files})
    publish(partial)
    return folder


def write_component(
    folder: Path, parameters: dict[str, Tensor], tensor_size: int, zero_size: int, *, gated: bool = False
) -> None:
    files: dict[str, dict[str, Tensor]] = {}
    index: dict[str, ParameterIndex] = {}
    for name, whole in parameters.items():
        dimension = SHARDED.get(name.split(".")[-2])
        if name.endswith(("linear_proj.bias", "linear_fc2.bias")) or folder.name == "encoders":
            dimension = None
        leaf = name.split(".")[-1]
        if dimension is not None and leaf in ADAPTER_CUTS:
            dimension = ADAPTER_CUTS[leaf][dimension]
        stride = 2 if gated and "linear_fc1" in name else 1
        shards = [whole]
        if dimension is not None:  # gate and value are cut each by itself
            strips = [strip.chunk(tensor_size, dimension) for strip in whole.chunk(stride, dimension)]
            shards = [torch.cat(own, dimension) for own in zip(*strips, strict=True)]
        pieces = []
        for tensor_rank, shard in enumerate(shards):
            start = 0
            for zero_rank, part in enumerate(shard.flatten().tensor_split(zero_size)):
                if not len(part):
                    continue
                file = rank_file(zero_rank * tensor_size + tensor_rank)
                pieces.append(Piece(file, tensor_rank, start, len(part)))
                start += len(part)
                for number, state in enumerate(STATES):
                    files.setdefault(file, {})[piece_name(name, state)] = part.clone() + number
        index[name] = ParameterIndex(tuple(whole.shape), dimension, stride, len(shards), tuple(pieces))
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    write_index(folder, index)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def training_model(workshop: Workshop, kind: str) -> TrainingModel:
    return workshop.training_model(kind)


@pytest.fixture
def hf_model(workshop: Workshop, kind: str) -> Any:
    return workshop.hf_model(kind)


@pytest.fixture
def processor(workshop: Workshop, kind: str) -> Any:
    return workshop.processor(kind)


@pytest.fixture
def tokenizer(workshop: Workshop) -> Tokenizer:
    return load_tokenizer(workshop.tokenizer_folder)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
