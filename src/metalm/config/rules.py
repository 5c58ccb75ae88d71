"""Rules that hold across sections of a config: pure functions, run before anything starts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from metalm.config.adapter_rules import adapter_problems
from metalm.config.deepspeed_services import service_problems
from metalm.config.model_schema import MEDIA_SECTIONS, TEXT, DecoderConfig, EncoderConfig
from metalm.config.schema import RunConfig, SourceConfig
from metalm.errors import ConfigError, TopologyError

PIPELINE_OWNED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "tensor_parallel",
    "prescale_gradients",
    "gradient_predivide_factor",
)
"""Keys that a DeepSpeed JSON may not hold, because the pipeline sets them."""


_OF_OUR_ENCODERS = (
    *("num_kv_heads", "activation", "normalization", "norm", "norm_eps", "biases", "positions", "rope_base"),
    *("relative_bias", "joint_layers", "dropout"),
)
"""What an encoder from transformers has in its own way."""


def check_config(
    config: RunConfig, decoder_json: Mapping[str, Any], encoders_json: Mapping[str, Any]
) -> None:
    """Check everything that does not depend on the number of ranks.

    Raises:
        ConfigError: naming every rule that is broken.
    """
    problems = [
        *_model_problems(config),
        *_data_problems(config),
        *_training_problems(config),
        *_checkpoint_problems(config),
        *_deepspeed_problems(config, str(config.deepspeed.decoder), decoder_json),
        *_deepspeed_problems(config, str(config.deepspeed.encoders), encoders_json),
        *service_problems(str(config.deepspeed.decoder), decoder_json),
        *service_problems(str(config.deepspeed.encoders), encoders_json),
    ]
    if problems:
        raise ConfigError("\n".join(["the configuration contradicts itself", *(f"  {p}" for p in problems)]))


def check_topology(config: RunConfig, world_size: int) -> None:
    """Check that `world_size` ranks can hold the run.

    Raises:
        TopologyError: naming every rule that is broken.
    """
    tensor, context = config.parallel.tensor, config.parallel.context
    if world_size % tensor:
        raise TopologyError(
            f"{world_size} rank(s) cannot be split into tensor-parallel groups of {tensor}: start a multiple "
            f"of {tensor} (`torchrun --nproc-per-node {tensor} -m metalm ...`; in a dry run --ranks {tensor})"
            ", or give parallel.tensor=1"
        )
    if world_size % config.parallel.rows_size:
        raise TopologyError(
            f"{world_size} rank(s) cannot be split into groups of parallel.tensor = {tensor} x "
            f"parallel.context = {context}: start a multiple of {config.parallel.rows_size}"
        )
    if config.monitor.profile_steps and max(config.monitor.profile_ranks, default=0) >= world_size:
        raise TopologyError(
            f"monitor.profile_ranks names rank {max(config.monitor.profile_ranks)}, but {world_size} rank(s) "
            "are started: they are numbered from 0"
        )
    data = world_size // config.parallel.rows_size
    decoder, training = config.model.decoder, config.training
    sizes = {
        "model.decoder.num_heads": decoder.num_heads,
        "model.decoder.num_kv_heads": decoder.key_value_heads,
        "model.decoder.ffn_hidden_size": decoder.feed_forward_size,
        "the padded vocabulary": config.model.padded_vocab_size,
    }
    problems = [
        f"{name} = {size} is not divisible by parallel.tensor = {tensor}"
        for name, size in sizes.items()
        if size % tensor
    ]
    problems += _context_problems(config)
    if config.data.lanes % data:
        problems.append(
            f"data.lanes = {config.data.lanes} is not divisible by {data} data-parallel ranks: start as many "
            "as divide it; a new run may have other lanes, which must divide training.global_batch_size"
        )
    if training.global_batch_size % (data * training.micro_batch_size):
        problems.append(
            f"training.global_batch_size = {training.global_batch_size} is not divisible by "
            f"{data} data-parallel ranks x training.micro_batch_size = {training.micro_batch_size}: "
            f"{_mended_batch(config, data)}"
        )
    if problems:
        between = f"context {context} x " if context > 1 else ""
        layout = f"{world_size} rank(s), tensor {tensor} x {between}data {data}"
        raise TopologyError("\n".join([f"the run does not fit on {layout}", *(f"  {p}" for p in problems)]))


def _mended_batch(config: RunConfig, data: int) -> str:
    """What makes the batch divisible by so many data-parallel ranks."""
    rows, rest = divmod(config.training.global_batch_size, data)
    if rest:
        return "start as many as divide it, or give another training.global_batch_size"
    return f"start fewer ranks, or give a training.micro_batch_size that divides {rows}"


def _context_problems(config: RunConfig) -> Iterator[str]:
    """Of the lengths and heads that are shared out beside the tensor-parallel cut."""
    parallel, decoder = config.parallel, config.model.decoder
    tensor, context = parallel.tensor, parallel.context
    cut = " x ".join(
        [f"parallel.context = {context}"] * (context > 1)
        + [f"parallel.tensor = {tensor}"] * parallel.sequence_parallel
    )
    if config.data.sequence_length % parallel.length_multiple:
        yield f"data.sequence_length = {config.data.sequence_length} is not divisible by {cut}"
    if context == 1 or decoder.num_heads % tensor or decoder.key_value_heads % tensor:
        return
    if decoder.num_heads % parallel.rows_size:
        yield (
            f"model.decoder.num_heads = {decoder.num_heads} is not divisible by parallel.tensor = {tensor} x "
            f"parallel.context = {context}: context ranks share the heads of a tensor-parallel rank"
        )
    elif (own := decoder.key_value_heads // tensor) % context and context % own:
        yield (
            f"model.decoder.num_kv_heads = {decoder.key_value_heads} leaves {own} to a tensor-parallel rank, "
            f"which parallel.context = {context} must divide, or be a multiple of"
        )


def _model_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    yield from _decoder_problems(config)
    yield from adapter_problems(model)
    for name, encoder in model.encoders.items():
        yield from _encoder_problems(f"model.encoders.{name}", encoder)
    if not (model.decoder.is_trained or any(encoder.is_trained for encoder in model.encoders.values())):
        yield (
            "nothing is trained: model.decoder.trained_layers is none, and no encoder, connector or adapter "
            "is trained"
        )


def _encoder_problems(where: str, encoder: EncoderConfig) -> Iterator[str]:
    if encoder.hidden_size % encoder.num_heads:
        yield (
            f"{where}.hidden_size = {encoder.hidden_size} is not divisible by num_heads = {encoder.num_heads}"
        )
    if encoder.num_heads % encoder.key_value_heads:
        yield (
            f"{where}.num_heads = {encoder.num_heads} is not divisible by "
            f"num_kv_heads = {encoder.num_kv_heads}"
        )
    yield from _unused_base(where, encoder)
    if encoder.positions == "rope" and encoder.media:
        yield f"{where}.positions: rope is of tokens in a line; an encoder of patches has learned positions"
    if encoder.positions == "rope" and encoder.head_size % 2:
        yield f"{where}.hidden_size / num_heads = {encoder.head_size} must be even for positions: rope"
    if encoder.pretrained is None and not encoder.max_text_positions:
        yield f"{where}.max_text_positions must be positive"
    if encoder.pretrained is not None:
        defaults = type(encoder).model_fields
        if given := [key for key in _OF_OUR_ENCODERS if getattr(encoder, key) != defaults[key].default]:
            yield f"{where}: {', '.join(given)} cannot be given for an encoder of transformers"
    elif encoder.media is not None and encoder.media.needs_pretrained:
        name = next(name for name in MEDIA_SECTIONS if encoder.section(name) is encoder.media)
        yield f"{where}.{name} is given, but only encoders of transformers (`pretrained`) read it"
    if encoder.media and encoder.relative_bias:
        yield f"{where}: relative_bias is of tokens in a line; an encoder of patches has them in a grid"
    bias = encoder.relative_bias
    if bias and bias.max_distance <= bias.num_buckets // 4:
        yield (
            f"{where}.relative_bias.max_distance = {bias.max_distance} is not above a quarter of "
            f"num_buckets = {bias.num_buckets}, which hold one distance each"
        )
    if encoder.joint_layers and not encoder.media:
        yield f"{where}.joint_layers is given, but the encoder has no patches (`image`) that it could route"
    for key in ("joint_layers", "trained_layers"):
        value = getattr(encoder, key)
        if isinstance(value, int) and value > encoder.num_layers:
            yield f"{where}.{key} = {value} is above num_layers = {encoder.num_layers}"


def _decoder_problems(config: RunConfig) -> Iterator[str]:
    decoder = config.model.decoder
    where = "model.decoder"
    if isinstance(decoder.trained_layers, int) and decoder.trained_layers > decoder.num_layers:
        yield (
            f"{where}.trained_layers = {decoder.trained_layers} is above num_layers = {decoder.num_layers}"
        )
    if decoder.head_dim is None and decoder.hidden_size % decoder.num_heads:
        yield (
            f"{where}.hidden_size = {decoder.hidden_size} is not divisible by num_heads = {decoder.num_heads}"
        )
    if decoder.num_heads % decoder.key_value_heads:
        yield (
            f"{where}.num_heads = {decoder.num_heads} is not divisible by "
            f"num_kv_heads = {decoder.num_kv_heads}"
        )
    if decoder.biases and decoder.qkv_biases:
        yield f"{where}.qkv_biases is for a decoder with biases: false; biases: true has them anyway"
    if decoder.scale_docked_vectors and not decoder.scale_embedding:
        yield f"{where}.scale_docked_vectors is given, but {where}.scale_embedding is false"
    if decoder.parallel_residual and decoder.normalization != "pre_ln":
        yield f"{where}.parallel_residual is for normalization: pre_ln, not {decoder.normalization}"
    if decoder.dropout and decoder.normalization != "deepnorm":
        yield (
            f"{where}.dropout = {decoder.dropout} is for normalization: deepnorm, not {decoder.normalization}"
        )
    if decoder.dropout and config.data.sequence_length % 4:
        yield (
            f"data.sequence_length = {config.data.sequence_length} must be a multiple of 4 with "
            f"{where}.dropout, which draws for four keys at once"
        )
    yield from _position_problems(config)


def _position_problems(config: RunConfig) -> Iterator[str]:
    decoder, length, where = config.model.decoder, config.data.sequence_length, "model.decoder"
    if decoder.positions == "sinusoidal" and decoder.hidden_size % 2:
        yield f"{where}.hidden_size = {decoder.hidden_size} must be even for sinusoidal positions"
    if decoder.positions == "rope" and decoder.rotary_size % 2:
        turned = "head_dim" if decoder.head_dim else "hidden_size / num_heads"
        turned += " * rope_share" if decoder.rope_share != 1.0 else ""
        yield f"{where}.{turned} = {decoder.rotary_size} must be even for positions: rope"
    if decoder.positions == "rope" and not decoder.rotary_size:
        yield f"{where}.rope_share = {decoder.rope_share} leaves nothing of a head to turn"
    if decoder.positions != "rope" and decoder.rope_share != 1.0:
        yield f"{where}.rope_share is for positions: rope, not {decoder.positions}"
    yield from _unused_base(where, decoder)
    if decoder.positions == "learned" and (decoder.max_positions or 0) < length:
        yield (
            f"{where}.max_positions = {decoder.max_positions} is below data.sequence_length = {length}, "
            "which learned positions must reach"
        )
    if decoder.positions != "learned" and decoder.max_positions is not None:
        yield f"{where}.max_positions is the length of learned positions, not of {decoder.positions} ones"
    if decoder.rope_scaling is not None:
        scaling = decoder.rope_scaling
        if decoder.positions != "rope":
            yield f"{where}.rope_scaling is for positions: rope, not {decoder.positions}"
        if scaling.low_frequency_factor >= scaling.high_frequency_factor:
            yield (
                f"{where}.rope_scaling.low_frequency_factor = {scaling.low_frequency_factor} is not below "
                f"high_frequency_factor = {scaling.high_frequency_factor}"
            )


def _data_problems(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.sources:
        yield "data.sources is empty"
    if math.isinf(sum(source.weight for source in data.sources.values())):
        yield "data.sources: the weights add up to infinity: divide all of them by the same number"
    if "all" in data.sources:
        yield "data.sources.all: loss/all is the loss of all sources: choose another name"
    if data.spans.min_length > data.spans.max_length:
        yield (
            f"data.spans.min_length = {data.spans.min_length} is above "
            f"data.spans.max_length = {data.spans.max_length}"
        )
    for group in ("sources", "evaluation"):
        for name, source in getattr(data, group).items():
            yield from _source_problems(config, f"data.{group}.{name}", source)
    for name, source in data.evaluation.items():
        if source.url is not None:
            yield f"data.evaluation.{name}.url is given, but held-out shards must lie on a file system"
        if source.augmentation is not None:
            yield f"data.evaluation.{name}.augmentation is given, but evaluation is of images as they are"


def _source_problems(config: RunConfig, where: str, source: SourceConfig) -> Iterator[str]:
    encoders, sequence_length = config.model.encoders, config.data.sequence_length
    if source.augmentation is not None and "image" not in source.readers:
        yield f"{where}.augmentation is of images, but {where}.readers names no encoder of them"
    for modality, name in source.readers.items():
        reader = f"{where}.readers.{modality}"
        encoder = encoders.get(name)
        if modality not in (TEXT, *MEDIA_SECTIONS):
            yield f"{reader}: no such modality; known: {', '.join((TEXT, *MEDIA_SECTIONS))}"
        elif encoder is None:
            near = difflib.get_close_matches(name, encoders, n=1)
            if modality != TEXT:
                yield f"{reader} = {name!r} is not in model.encoders ({', '.join(encoders) or 'none'})"
            elif near:
                yield f"{reader} = {name!r} is not in model.encoders: did you mean {near[0]!r}?"
        elif modality != TEXT:
            media = encoder.section(modality)
            if media is None:
                yield f"{reader} = {name!r}, but that encoder has no `{modality}` section"
            elif media.num_patches + 3 > sequence_length:
                yield (
                    f"{where}: {media.num_patches} patches, start, one caption token and end do not fit in "
                    f"data.sequence_length = {sequence_length}"
                )
        elif source.has_random_spans:
            yield from _span_problems(config, name, encoder)
        elif source.overflow is None and encoder.pretrained is not None and encoder.max_text_positions:
            yield f"{reader} = {name!r} has a tokenizer of its own: it cannot read prefixes of captions"


def _span_problems(config: RunConfig, name: str, encoder: EncoderConfig) -> Iterator[str]:
    longest, length = config.data.spans.max_length, config.data.sequence_length
    if longest > encoder.max_text_positions:
        yield (
            f"data.spans.max_length = {longest} is above model.encoders.{name}."
            f"max_text_positions = {encoder.max_text_positions}"
        )
    if longest + 2 > length:
        yield f"data.spans.max_length = {longest} leaves no room in data.sequence_length = {length}"


def _training_problems(config: RunConfig) -> Iterator[str]:
    training = config.training
    if training.global_batch_size % config.data.lanes:
        yield (
            f"training.global_batch_size = {training.global_batch_size} is not divisible by "
            f"data.lanes = {config.data.lanes}: make one a multiple of the other, such as data.lanes="
            f"{math.gcd(training.global_batch_size, config.data.lanes)}"
        )
    if training.schedule.warmup_steps >= training.steps:
        yield (
            f"training.schedule.warmup_steps = {training.schedule.warmup_steps} is not below "
            f"training.steps = {training.steps}: "
            f"give training.schedule.warmup_steps={training.steps // 10} as well"
        )
    if beyond := [step for step in config.monitor.profile_steps if step > training.steps]:
        yield f"monitor.profile_steps has {beyond[0]}, above training.steps = {training.steps}"
    yield from _decay_problems(config)
    rates = training.optimizer.learning_rates
    for group in ("encoders", "connectors"):
        for name in getattr(rates, group).keys() - config.model.encoders.keys():
            known = ", ".join(config.model.encoders) or "none"
            yield f"training.optimizer.learning_rates.{group}.{name} is not in model.encoders ({known})"


def _unused_base(where: str, model: DecoderConfig | EncoderConfig) -> Iterator[str]:
    if model.positions != "rope" and model.rope_base != type(model).model_fields["rope_base"].default:
        yield f"{where}.rope_base is for positions: rope, not {model.positions}"


def _decay_problems(config: RunConfig) -> Iterator[str]:
    training, schedule, where = config.training, config.training.schedule, "training.schedule"
    if schedule.decay == "constant" and schedule.final_fraction:
        yield f"{where}.final_fraction = {schedule.final_fraction} is given, but {where}.decay is constant"
    if schedule.decay_steps is None:
        return
    if schedule.decay == "constant":
        yield f"{where}.decay_steps = {schedule.decay_steps} is given, but {where}.decay is constant"
    elif schedule.warmup_steps + schedule.decay_steps > training.steps:
        yield (
            f"{where}: warmup_steps = {schedule.warmup_steps} and decay_steps = {schedule.decay_steps} are "
            f"together above training.steps = {training.steps}"
        )


def _checkpoint_problems(config: RunConfig) -> Iterator[str]:
    initialize, best = config.initialize, config.checkpoint.keep_best
    if initialize.run is not None and (initialize.decoder or initialize.encoders or initialize.new):
        yield (
            "initialize.run goes on with all of a checkpoint: leave initialize.decoder, initialize.encoders "
            "and initialize.new out, or initialize.run"
        )
    elif initialize.new and not (initialize.decoder or initialize.encoders):
        yield "initialize.new is of a run that starts from initialize.decoder or initialize.encoders"
    if best is None:
        return
    source = best.figure.split("/")[1]
    if source not in config.data.evaluation:
        known = ", ".join(f"held_out/{name}" for name in config.data.evaluation) or "none"
        yield f"checkpoint.keep_best.figure = {best.figure!r} is of no source of data.evaluation ({known})"
    every, saved = config.monitor.evaluate_every_steps, config.checkpoint.every_steps
    if every % saved:
        yield (
            f"monitor.evaluate_every_steps = {every} is not a multiple of checkpoint.every_steps = {saved}: "
            "checkpoint.keep_best needs a checkpoint at each evaluation"
        )


def _deepspeed_problems(config: RunConfig, path: str, content: Mapping[str, Any]) -> Iterator[str]:
    owned = [key for key in content if key in PIPELINE_OWNED_KEYS]
    if owned:
        yield f"{path} holds {', '.join(owned)}, which the pipeline owns: set them in the pipeline instead"
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield f"{path}: zero_optimization must hold an object"
        return
    offload_section = zero.get("offload_optimizer") or {}
    if not isinstance(offload_section, dict):
        yield f"{path}: zero_optimization.offload_optimizer must hold an object"
        return
    stage = zero.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        # At stage 0 DeepSpeed reduces gradients over the group of whichever engine was built last.
        yield f"{path}: zero_optimization.stage must be 1, 2 or 3, not {stage!r}"
    offload = offload_section.get("device", "none")
    if offload not in ("none", "cpu"):
        yield f"{path}: offload_optimizer.device must be cpu, not {offload!r}, where no checkpoint reads it"
    if offload == "cpu" and content.get("zero_force_ds_cpu_optimizer", True):
        yield f"{path}: offload_optimizer needs zero_force_ds_cpu_optimizer: false, since AdamW is torch's"
