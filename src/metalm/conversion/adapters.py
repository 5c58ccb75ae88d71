"""The adapters of a checkpoint: merged into the weights, or as a folder that peft loads beside them.

An adapted map is known by its parameters in the checkpoint. A projection that is fused here and several there
has one A, which each of them gets, and its own rows of B.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from metalm.checkpoint.reader import CheckpointReader
from metalm.config import AdapterConfig, ModelConfig
from metalm.conversion.mapping import Rule
from metalm.errors import CheckpointError, ConfigError
from metalm.model.adapters import (
    IA3,
    LORA_A,
    LORA_B,
    KeyValueScale,
    decoder_key_values,
    encoder_key_values,
    is_adapter,
)

ADAPTER_FOLDER = "adapter"
"""In an exported folder."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_INPUT_SCALED = ("linear_fc2", "ffn_out")


def without_adapters(model: ModelConfig) -> ModelConfig:
    """The model into which its adapters are merged."""
    decoder = model.decoder.model_copy(update={"adapter": None})
    encoders = {name: e.model_copy(update={"adapter": None}) for name, e in model.encoders.items()}
    return model.model_copy(update={"decoder": decoder, "encoders": encoders})


@dataclass(frozen=True)
class Adapters:
    """Of a checkpoint's model."""

    model: ModelConfig
    reader: CheckpointReader

    def check(self, rules: list[Rule]) -> None:
        """Compare them with the maps that they stand beside.

        Raises:
            CheckpointError: one is incomplete, of a shape that does not fit, or beside nothing; or a
                component's config names an adapter and the checkpoint has none of it.
        """
        shapes = {(rule.component, rule.name): rule.shape for rule in rules}
        found: set[str] = set()
        for component in self.reader.components():
            own = self.reader.parameters(component)
            for name in filter(is_adapter, own):
                module, _, leaf = name.rpartition(".")
                config = self._config_of(component, name)
                weight = shapes.get((component, f"{module}.weight"))
                if config is None or weight is None:
                    raise self._misfit(component, name, "the model has no such adapter")
                rank = (config.factor_rank,)
                wanted = {LORA_A: rank + weight[1:], LORA_B: weight[:1] + rank}
                if leaf == IA3:
                    places = self._key_values(component, module)
                    wanted = {IA3: (places.size,) if places else weight[1:]}
                for part, shape in wanted.items():
                    if own.get(f"{module}.{part}") != shape:
                        raise self._misfit(component, f"{module}.{part}", f"expected shape {list(shape)}")
                found.add(self._place(component, name))
        for place in self._configs().keys() - found:
            raise CheckpointError(f"{self.reader.folder} has no weights of the adapter of {place}")

    def merged(self, component: str, name: str, whole: Tensor) -> Tensor:
        """A weight or bias with its adapter in it, if it has one.

        Args:
            component: `decoder` or `encoders`.
            name: of the parameter.
            whole: the parameter, float32.
        """
        module, _, leaf = name.rpartition(".")
        names = self.reader.parameters(component)
        if f"{module}.{LORA_A}" in names and leaf == "weight":
            config = self._config_of(component, name)
            assert config is not None
            a, b = (self.reader.read(component, f"{module}.{part}") for part in (LORA_A, LORA_B))
            return whole + config.scale * (b @ a)
        if f"{module}.{IA3}" in names:
            vector = self.reader.read(component, f"{module}.{IA3}")
            places = self._key_values(component, module)
            if places is not None:
                rows = places.rows(vector)
                return whole * (rows if leaf == "bias" else rows[:, None])
            return whole if leaf == "bias" else whole * vector
        return whole

    def write(self, rules: list[Rule], base: Path, folder: Path) -> None:
        """Write a folder for `peft.PeftModel.from_pretrained`.

        Args:
            rules: of the model without adapters.
            base: the exported folder of that model.
            folder: is made.

        Raises:
            ConfigError: the model has no adapter, or adapters of two kinds.
        """
        configs = self._configs()
        kinds = {config.kind for config in configs.values()}
        if len(kinds) != 1:
            what = "adapters of two kinds, which peft keeps apart" if kinds else "no adapter"
            raise ConfigError(
                f"{self.reader.folder} has {what}: export it without --adapter, which merges them"
            )
        is_lora = kinds == {"lora"}
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for rule in rules:
            if not rule.name.endswith(".weight"):
                continue
            parts = self._lora_parts(rule) if is_lora else self._ia3_parts(rule)
            for target, own in parts:
                tensors |= {f"{_PREFIX}{target}.{leaf}": part.contiguous() for leaf, part in own.items()}
                config = self._config_of(rule.component, rule.name)
                assert config is not None
                ranks[target], alphas[target] = config.factor_rank, config.scale * config.factor_rank
        content: dict[str, Any] = {
            "base_model_name_or_path": str(base),
            "inference_mode": True,
            "peft_type": kinds.pop().upper(),
            "target_modules": sorted(ranks),
            "task_type": None,
        }
        if is_lora:
            first = next(iter(ranks))
            content |= {"r": ranks[first], "lora_alpha": alphas[first], "lora_dropout": 0.0, "bias": "none"}
            content |= {"rank_pattern": ranks, "alpha_pattern": alphas}
        else:
            scaled = [name for name in ranks if name.endswith("down_proj")]
            content |= {"feedforward_modules": sorted(scaled)}
        folder.mkdir()
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n")

    def _lora_parts(self, rule: Rule) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """By module of the exported model, its factors."""
        module = rule.name.removesuffix(".weight")
        if f"{module}.{LORA_A}" not in self.reader.parameters(rule.component):
            return
        a, b = (self.reader.read(rule.component, f"{module}.{part}") for part in (LORA_A, LORA_B))
        for target, rows in zip(rule.targets, rule.split(b), strict=True):
            yield target.removesuffix(".weight"), {"lora_A.weight": a.clone(), "lora_B.weight": rows}

    def _ia3_parts(self, rule: Rule) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """By module of the exported model, its vector; of queries, which are not scaled, none."""
        module = rule.name.removesuffix(".weight")
        if f"{module}.{IA3}" not in self.reader.parameters(rule.component):
            return
        vector = self.reader.read(rule.component, f"{module}.{IA3}")
        places = self._key_values(rule.component, module)
        if places is None:
            (target,) = rule.targets
            yield target.removesuffix(".weight"), {"ia3_l": vector[None]}
            return
        for target, rows in zip(rule.targets, rule.split(places.rows(vector)[:, None]), strict=True):
            if not target.endswith("q_proj.weight"):
                yield target.removesuffix(".weight"), {"ia3_l": rows}

    def _key_values(self, component: str, module: str) -> KeyValueScale | None:
        """How IA3's vector lies in the rows of a projection; None where it scales the input."""
        if module.endswith(_INPUT_SCALED):
            return None
        if component == "decoder":
            return decoder_key_values(self.model.decoder)
        return encoder_key_values(self.model.encoders[module.split(".")[1]])

    def _configs(self) -> dict[str, AdapterConfig]:
        """By place: `decoder` or the name of an encoder."""
        parts = {"decoder": self.model.decoder, **self.model.encoders}
        return {place: part.adapter for place, part in parts.items() if part.adapter is not None}

    def _config_of(self, component: str, name: str) -> AdapterConfig | None:
        return self._configs().get(self._place(component, name))

    def _place(self, component: str, name: str) -> str:
        return "decoder" if component == "decoder" else name.split(".")[1]

    def _misfit(self, component: str, name: str, problem: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.reader.folder} does not fit its config: {component}.{name}: {problem}"
        )
