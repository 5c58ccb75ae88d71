"""The two DeepSpeed engines of a run: the decoder over its TP x DP grid, the encoders over all ranks."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
from torch import nn

from metalm.config import OptimizerConfig, RunConfig
from metalm.config.load import load_deepspeed_json
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.encoder import EncoderBank, encoder_draw, load_pretrained_weights
from metalm.model.initialization import initialize_parameters
from metalm.parallel.mpu import Mpu, decoder_mpu, encoders_mpu
from metalm.parallel.topology import Topology
from metalm.training.extensions import prepare_extensions
from metalm.training.owned_ranges import create_optimizer_state


@dataclass(frozen=True)
class Engines:
    """DeepSpeed engines by component; a model without encoders has a decoder alone."""

    decoder: Any
    encoders: Any | None

    def by_component(self) -> dict[str, Any]:
        """`decoder` and, where there is one, `encoders`."""
        engines = {"decoder": self.decoder}
        return engines if self.encoders is None else engines | {"encoders": self.encoders}


def gradient_accumulation_steps(config: RunConfig, data_size: int) -> int:
    """Micro-batches per optimizer step of one data-parallel rank."""
    return config.training.global_batch_size // (data_size * config.training.micro_batch_size)


def build_engines(
    config: RunConfig, topology: Topology, given: Mapping[str, Collection[str]] = MappingProxyType({})
) -> Engines:
    """Build and shard the model, with the weights that a new run starts with.

    Args:
        config: of the run.
        topology: this rank's place.
        given: by component, parameters that are read from a checkpoint afterwards. They are not drawn,
            and are no numbers until then.

    Raises:
        ConfigError: the folder of a pretrained encoder, whose weights are not given, cannot be used.

    Collective: every rank of the job.
    """
    prepare_extensions()
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints on every rank
        deepspeed.init_distributed(verbose=False)
        decoder = _build_decoder(config, topology, given.get("decoder", ()))
        encoders = _build_encoders(config, topology, given.get("encoders", ()))
    return Engines(decoder, encoders)


def _build_decoder(config: RunConfig, topology: Topology, given: Collection[str]) -> Any:
    module = Decoder(
        config.model,
        config.data.sequence_length,
        topology,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    initialize_parameters(
        module,
        "decoder",
        config.run.seed,
        lambda name: decoder_draw(config.model.decoder, name),
        topology.tensor_rank,
        topology.tensor_size,
        given,
    )
    return _build_engine(config, module, config.deepspeed.decoder, decoder_mpu(topology), topology)


def _build_encoders(config: RunConfig, topology: Topology, given: Collection[str]) -> Any | None:
    if not config.model.encoders:
        return None
    module = EncoderBank(config.model)
    is_given = all(name in given for name, _ in module.named_parameters())
    pretrained = {} if is_given else load_pretrained_weights(config.model)
    initialize_parameters(
        module,
        "encoders",
        config.run.seed,
        lambda name: encoder_draw(config.model, name, pretrained),
        0,
        1,
        given,
    )
    return _build_engine(config, module, config.deepspeed.encoders, encoders_mpu(topology), topology)


def _build_engine(config: RunConfig, module: nn.Module, json_path: Path, mpu: Mpu, topology: Topology) -> Any:
    content = load_deepspeed_json(json_path)
    if content["zero_optimization"]["stage"] == 3 and isinstance(module, Decoder):
        # The loss reads the output layer's weight outside the forward of the module that holds it.
        deepspeed.zero.register_external_parameter(module, module.output_weight)
    owned = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(config, topology.data_size),
        "gradient_clipping": config.training.optimizer.gradient_clipping,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "steps_per_print": sys.maxsize,
    }
    engine, *_ = deepspeed.initialize(
        model=module.to(topology.device),
        optimizer=_build_optimizer(module, config.training.optimizer, topology.device),
        config=content | owned,
        mpu=mpu,
    )
    create_optimizer_state(engine)
    return engine


def _build_optimizer(
    module: nn.Module, config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; biases and normalisation weights do not decay."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=device.type == "cuda"
    )
