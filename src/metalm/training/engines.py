"""The two DeepSpeed engines of a run: the decoder over its TP x DP grid, the encoders over all ranks."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from metalm.config import OptimizerConfig, RunConfig
from metalm.config.load import load_deepspeed_json
from metalm.model.cuda_recorder import CudaRecorder
from metalm.model.decoder import Decoder, decoder_draw
from metalm.model.encoder import Encoder, EncoderBank, encoder_draw, load_pretrained_weights
from metalm.model.graph_rules import why_no_encoder_graphs, why_not_graphs
from metalm.model.graphs import MAX_ENCODER_FORMS, LayerGraphs
from metalm.model.initialization import initialize_parameters
from metalm.parallel.agreement import together
from metalm.parallel.mpu import Mpu, decoder_mpu, encoders_mpu
from metalm.parallel.topology import Topology
from metalm.progress import Phase
from metalm.training.extensions import prepare_extensions
from metalm.training.fp32_gradients import gradient_keys, keep_fp32_gradients
from metalm.training.frozen_engine import FrozenEngine
from metalm.training.gradient_norm import is_left_to_us, refuses_on_device
from metalm.training.leaf_modules import mark_leaf_modules
from metalm.training.owned_ranges import create_optimizer_state

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RATE_RATIO = "rate_ratio"
"""Key of an optimizer's parameter group."""


@dataclass(frozen=True)
class Engines:
    """DeepSpeed engines by component; a model without encoders has a decoder alone.

    A component of which nothing is trained is a `FrozenEngine`; one of them at least is trained.
    """

    decoder: Any
    encoders: Any | None

    def by_component(self) -> dict[str, Any]:
        """`decoder` and, where there is one, `encoders`."""
        engines = {"decoder": self.decoder}
        return engines if self.encoders is None else engines | {"encoders": self.encoders}

    def trained(self) -> dict[str, Any]:
        """Those with an optimizer, by component."""
        engines = self.by_component().items()
        return {name: engine for name, engine in engines if not isinstance(engine, FrozenEngine)}

    def count_skipped(self) -> None:
        """Count a step that was refused, in engines that do not see it themselves: see `JointNorm`."""
        for engine in self.trained().values():
            if is_left_to_us(engine.optimizer):
                engine.skipped_steps += 1

    def backward(self, loss: Tensor) -> None:
        """The backward pass through all of them, of a loss that is scaled as `TrainStep` says."""
        first = next(iter(self.trained().values()))
        first.backward(loss, scale_wrt_gas=False)


def gradient_accumulation_steps(config: RunConfig, data_size: int) -> int:
    """Micro-batches per optimizer step of one data-parallel rank."""
    return config.training.global_batch_size // (data_size * config.training.micro_batch_size)


def build_engines(
    config: RunConfig, topology: Topology, given: Mapping[str, Collection[str]] = MappingProxyType({})
) -> Engines:
    """Build and shard the model, with the weights that a new run starts with.

    Weights are drawn once: the decoder's by the first data-parallel rank of each tensor rank, the encoders'
    by the first rank. DeepSpeed gives them to the others, in the precision that the model works in.

    Args:
        config: of the run.
        topology: this rank's place.
        given: by component, parameters that are read from a checkpoint afterwards. They are not drawn,
            and are no numbers until then.

    Raises:
        ConfigError: the folder of a pretrained encoder, whose weights are not given, cannot be used.

    Collective: every rank of the job.
    """
    with Phase("preparing DeepSpeed's extension"):
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
    with together():
        initialize_parameters(
            module,
            "decoder",
            config.run.seed,
            lambda name: decoder_draw(config.model.decoder, name),
            topology.tensor_rank,
            topology.tensor_size,
            given if topology.data_rank == 0 else _names(module),
            dtype=_DTYPES[config.training.precision],
            device=topology.device,
        )
    engine = _build_engine(config, module, config.deepspeed.decoder, decoder_mpu(topology), topology)
    if reason := why_not_graphs(config, topology.device.type, engine.zero_optimization_stage()):
        logger.info("the decoder's layers run without CUDA graphs: %s", reason)
    else:
        module.graphs = LayerGraphs(module.gpt.decoder.layers, CudaRecorder(topology.device))
    return engine


def _build_encoders(config: RunConfig, topology: Topology, given: Collection[str]) -> Any | None:
    if not config.model.encoders:
        return None
    module = EncoderBank(config.model)
    if topology.rank:
        given = _names(module)
    with together():
        pretrained = {} if _names(module) <= set(given) else load_pretrained_weights(config.model)
        initialize_parameters(
            module,
            "encoders",
            config.run.seed,
            lambda name: encoder_draw(config.model, name, pretrained),
            0,
            1,
            given,
            dtype=_DTYPES[config.training.precision],
            device=topology.device,
        )
    engine = _build_engine(config, module, config.deepspeed.encoders, encoders_mpu(topology), topology)
    stage = engine.zero_optimization_stage()
    for name, encoder in module.encoders.items():
        shape = config.model.encoders[name]
        if reason := why_no_encoder_graphs(config, shape, topology.device.type, stage):
            logger.info("the layers of encoder %s run without CUDA graphs: %s", name, reason)
        elif isinstance(encoder, Encoder):
            encoder.graphs = LayerGraphs(
                list(encoder.layers),
                CudaRecorder(topology.device),
                what=f"shares of encoder {name}",
                max_forms=MAX_ENCODER_FORMS,
            )
    return engine


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def _build_engine(config: RunConfig, module: nn.Module, json_path: Path, mpu: Mpu, topology: Topology) -> Any:
    content = load_deepspeed_json(json_path)
    if content["zero_optimization"]["stage"] == 3 and isinstance(module, Decoder):
        # The loss reads the output layer's weight outside the forward of the module that holds it.
        deepspeed.zero.register_external_parameter(module, module.output_weight)
    if content["zero_optimization"]["stage"] == 3 and isinstance(module, EncoderBank):
        mark_leaf_modules(module)
    owned = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(config, topology.data_size),
        "gradient_clipping": config.training.optimizer.gradient_clipping,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "steps_per_print": sys.maxsize,
        **gradient_keys(config.training, content),
    }
    # Its timer of throughput, which nothing shows, waits for the device twice in every micro-batch.
    content = {"timers": {"throughput": {"enabled": False}}} | content | owned
    module.to(topology.device)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return FrozenEngine(module, content, mpu)
    component = "decoder" if isinstance(module, Decoder) else "encoders"
    optimizer = _build_optimizer(module, component, config.training.optimizer, topology.device)
    if refuses_on_device(optimizer, content):
        content["bf16"] = {"enabled": True, "check_grad_overflow": False}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=content, mpu=mpu)
    keep_fp32_gradients(engine.optimizer, config.training, content)
    # In each backward pass it would look up, parameter by parameter, how many take part, to know when the
    # last one is done; autograd calls it at the end anyway.
    engine.optimizer.should_refresh_expected_hook_count = lambda: False
    create_optimizer_state(engine, with_average=config.training.average is not None)
    return engine


def _build_optimizer(
    module: nn.Module, component: str, config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; biases and normalisation weights do not decay, components may have their own learning rates.

    Each group says in `RATE_RATIO` what the common learning rate is multiplied by.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            peak = config.learning_rates.of(component, name) or config.learning_rate
            key = (peak / config.learning_rate, parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    decays = {True: config.weight_decay, False: 0.0}
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decays[is_matrix], RATE_RATIO: ratio}
            for (ratio, is_matrix), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
