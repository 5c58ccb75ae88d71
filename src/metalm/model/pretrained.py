"""Encoders from transformers: text over packed spans, images, and audio, docked through a connector of ours.

The model's code is transformers' own; what it says and its weights come from a local folder, as safetensors
and JSON alone. Every vector of a span docks, except those that a model puts before the patches of an image or
clip, and those of silence behind a clip that is shorter than others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from metalm.batch import EncoderShare
from metalm.config import EncoderConfig
from metalm.config.foreign_folder import read_foreign_config
from metalm.config.pretrained_folder import image_size_of, positions_before_text
from metalm.errors import ConfigError
from metalm.kernels import IntervalMask
from metalm.kernels.adapters import register_interval_attention
from metalm.modalities import Media, modality_of_encoder
from metalm.model.adapters import adapt_pretrained, is_adapter
from metalm.model.connector import build_connector
from metalm.model.image_positions import fit_positions
from metalm.model.visibility import share_mask

CHECK_LENGTHS = (5, 160)
"""Of the two spans on which packing is tried."""
CHECK_TOLERANCE = 1e-4


class PretrainedEncoder(nn.Module):
    """A model of transformers with its connector: packed elements in, vectors of the decoder's width out."""

    def __init__(self, config: EncoderConfig, decoder_hidden_size: int) -> None:
        super().__init__()
        assert config.pretrained is not None
        self.config, self.modality = config, modality_of_encoder(config)
        self.first_position = positions_before_text(config.pretrained.definition)
        self.model = build_skeleton(config)
        self.connector = build_connector(config.connector, config.hidden_size, decoder_hidden_size)
        self.connector.requires_grad_(config.trained_connector)
        trained = trained_names(self.model, config)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        if config.adapter is not None:
            adapt_pretrained(self.model, config.adapter, _unused_names(config))
        if config.recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def layers(self) -> nn.ModuleList:
        """Of the model, the first one first."""
        found: nn.ModuleList = self.model.get_submodule(
            _layers_prefix(self.model, self.config.num_layers).removesuffix(".")
        )
        return found

    def forward(self, share: EncoderShare) -> Tensor:
        """Encode one share: [L, decoder hidden size]. See `Encoder.forward`."""
        if not isinstance(self.modality, Media):
            return self.connector(self._encode_text(share))
        slots, dtype = share.patch_slots, next(self.connector.parameters()).dtype
        patches = self.modality.encode(self.model, share, self.config, dtype)
        if not slots.numel():  # the dummy element
            slots, patches = slots.new_zeros(1), patches[:1]
        length = share.token_ids.shape[0]
        vectors = self.connector(patches)
        return vectors.new_zeros(length, vectors.shape[1]).index_copy(0, slots, vectors)

    def _encode_text(self, share: EncoderShare) -> Tensor:
        return encode_packed(
            self.model, share.token_ids, share.positions + self.first_position, share_mask(share)
        )


def encode_packed(model: nn.Module, token_ids: Tensor, positions: Tensor, mask: IntervalMask) -> Tensor:
    """Vectors [L, D] of token ids [L] that lie end to end, each seeing its interval."""
    found = model(
        input_ids=token_ids[None],
        position_ids=positions[None],
        token_type_ids=torch.zeros_like(token_ids)[None],
        interval_mask=mask,
    )
    return found.last_hidden_state[0]


def build_skeleton(config: EncoderConfig) -> Any:
    """The model with random weights, its parts for other tasks left out, and the attention that it can use.

    Raises:
        ConfigError: transformers cannot build it, or it cannot read packed spans.
    """
    model = _build(config)
    if any(parameter.is_meta for parameter in model.parameters()):
        return model
    return _with_interval_attention(model, config)


def load_weights(config: EncoderConfig) -> dict[str, Tensor]:
    """The folder's weights by parameter name of the skeleton, float32.

    Raises:
        ConfigError: the folder has no safetensors, or they lack a parameter that the vectors depend on.
    """
    assert config.pretrained is not None
    folder = config.pretrained.path
    with torch.device("meta"):
        skeleton = build_skeleton(config)
    read_foreign_config(folder)
    settings = skeleton.config
    if config.pretrained.image_size is not None:
        settings = copy.deepcopy(settings)
        settings.image_size = image_size_of(folder)
    try:
        with _quietly():
            model, report = type(skeleton).from_pretrained(
                folder,
                config=settings,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # SafetensorError, or what a damaged header leads to
        raise ConfigError(f"the weights in {folder} cannot be read: {error}") from None
    wanted = dict(skeleton.named_parameters())
    if missing := sorted(set(report["missing_keys"]) & wanted.keys()):
        raise ConfigError(f"{folder} lacks {len(missing)} weight(s), such as {missing[0]}")
    found = {name: value for name, value in model.named_parameters() if name in wanted}
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            found[name] = fit_positions(found[name].detach(), tuple(parameter.shape))
    return found


def trained_names(model: Any, config: EncoderConfig) -> set[str]:
    """Parameters that `trained_layers` trains; never those that the vectors do not depend on."""
    names = {name for name, _ in model.named_parameters()}
    if config.trained_layers != "all":
        layers = _layers_prefix(model, config.num_layers)
        in_front, first_trained = _unused_names(config, behind_layers=True), config.num_frozen_layers
        names = {
            name
            for name in names
            if (
                int(name.removeprefix(layers).split(".")[0]) >= first_trained
                if name.startswith(layers)
                # A norm behind the layers goes with the last of them.
                else name not in in_front and first_trained < config.num_layers
            )
        }
    return names - _unused_names(config)


def parameter_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters, without the connector's."""
    with torch.device("meta"):
        model = build_skeleton(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@lru_cache(maxsize=8)
def count_parameters(encoder: str) -> tuple[int, int]:
    """Trained and frozen parameters of an `EncoderConfig` as JSON, with its adapter, without connector."""
    config = EncoderConfig.model_validate_json(encoder)
    with torch.device("meta"):
        model = build_skeleton(config)
    trained = trained_names(model, config)
    if config.adapter is not None:
        adapt_pretrained(model, config.adapter, _unused_names(config))
        trained |= {name for name, _ in model.named_parameters() if is_adapter(name)}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    num_trained = sum(size for name, size in sizes.items() if name in trained)
    return num_trained, sum(sizes.values()) - num_trained


@contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars and reports of weights for other tasks."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _build(config: EncoderConfig) -> Any:
    assert config.pretrained is not None
    definition = dict(config.pretrained.definition)
    try:
        settings = AutoConfig.for_model(definition.pop("model_type"), **definition)
        model = AutoModel.from_config(settings, trust_remote_code=False, dtype=torch.float32)
    except Exception as error:  # of sizes that do not fit each other, whatever their arithmetic raises
        raise ConfigError(f"{config.pretrained.path}: transformers cannot build it: {error}") from None
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ConfigError(
            f"{config.pretrained.path}: a model of type {config.pretrained.model_type!r} has batch norms, "
            "whose statistics would depend on the ranks"
        )
    # The definition has no dropout under any name that was known when it was read.
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        raise ConfigError(
            f"{config.pretrained.path}: a model of type {config.pretrained.model_type!r} has dropout under a "
            "name that is not known, whose draws would depend on the ranks"
        )
    return model


def _with_interval_attention(model: Any, config: EncoderConfig) -> Any:
    """The model through the interval kernel if it then gives what it gave; images and clips have others."""
    expected, own_attention = _try(model, config, alone=True), model.config._attn_implementation
    model.set_attn_implementation(register_interval_attention())
    try:
        found = _try(model, config, alone=False)
        fits = torch.allclose(found, expected, atol=CHECK_TOLERANCE, rtol=CHECK_TOLERANCE)
    except (ValueError, TypeError, RuntimeError):
        fits = False
    if fits:
        return model
    if config.media is None:
        assert config.pretrained is not None
        raise ConfigError(
            f"{config.pretrained.path}: a model of type {config.pretrained.model_type!r} does not read "
            "packed spans as it reads them alone; expected one such as BERT, RoBERTa, XLM-R or ELECTRA"
        )
    model.set_attn_implementation(own_attention)  # such as BEiT's with its dense bias
    return model


def _try(model: Any, config: EncoderConfig, *, alone: bool) -> Tensor:
    """Vectors of an image or of clips, or of two spans: each by itself, or packed."""
    generator = torch.Generator().manual_seed(0)
    model.eval()
    with torch.no_grad():
        modality = modality_of_encoder(config)
        if isinstance(modality, Media):
            return modality.try_out(model, config, generator)
        lengths = [min(length, config.max_text_positions) for length in CHECK_LENGTHS]
        spans = [torch.randint(4, model.config.vocab_size, (n,), generator=generator) for n in lengths]
        if alone:
            return torch.cat([model(input_ids=span[None]).last_hidden_state[0] for span in spans])
        assert config.pretrained is not None
        first = positions_before_text(config.pretrained.definition)
        start = torch.repeat_interleave(torch.tensor([0, lengths[0]]), torch.tensor(lengths)).int()
        end = torch.repeat_interleave(torch.tensor([lengths[0], sum(lengths)]), torch.tensor(lengths)).int()
        mask = IntervalMask(start[None], end[None], sum(lengths))
        positions = torch.cat([torch.arange(n) for n in lengths]) + first
        return encode_packed(model, torch.cat(spans), positions, mask)


def _layers_prefix(model: Any, num_layers: int) -> str:
    """The last list of so many modules: those of convolutions come first."""
    found = [
        name + "."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if found:
        return found[-1]
    raise ConfigError(f"{type(model).__name__} has no list of {num_layers} layers")


def _unused_names(config: EncoderConfig, *, behind_layers: bool = False) -> frozenset[str]:
    """Parameters that no gradient of the vectors reaches, or none that goes through no layer."""
    assert config.pretrained is not None
    return _find_unused(config.model_copy(update={"recompute": False}).model_dump_json(), behind_layers)


@lru_cache(maxsize=8)
def _find_unused(encoder: str, behind_layers: bool) -> frozenset[str]:
    """As `_unused_names`, found on the meta device."""
    config = EncoderConfig.model_validate_json(encoder)
    with torch.device("meta"), torch.enable_grad():
        model = _build(config).eval()  # nothing is drawn, which has no value on the meta device
        if behind_layers:
            layers = model.get_submodule(_layers_prefix(model, config.num_layers).removesuffix("."))
            layers[-1].register_forward_hook(lambda module, inputs, output: _cut_off(output))
        modality = modality_of_encoder(config)
        if isinstance(modality, Media):
            vectors = modality.vectors_of_zeros(model, config)
        else:
            vectors = model(input_ids=torch.zeros(1, 8, dtype=torch.long)).last_hidden_state
        vectors.sum().backward()
    return frozenset(name for name, parameter in model.named_parameters() if parameter.grad is None)


def _cut_off(output: Any) -> Any:
    """What a layer gives, through which no gradient goes back."""
    if isinstance(output, tuple):
        return tuple(map(_cut_off, output))
    return output.detach().requires_grad_() if isinstance(output, Tensor) else output
