"""MetaLM in transformers: a causal decoder into whose input the vectors of encoders are docked.

Follows "Language Models are General-Purpose Interfaces" (arXiv 2206.06336). Shape letters: B rows,
S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_metalm import MetaLMConfig
from .encoder_metalm import MetaLMEncoder, MetaLMEncoders, Spans, spans_of_images
from .layers_metalm import (
    MetaLMCausalAttention,
    MetaLMDecoderLayer,
    MetaLMLinear,
    build_norm,
    rotary_factors,
    sinusoidal_positions,
)

logger = logging.get_logger(__name__)

EMBEDDING_STD = 0.02
INTERVAL_ATTENTION = "metalm_interval"
"""Attention implementation of the `metalm` package, which need not be installed."""
CACHE_NAME = fields(BaseModelOutputWithPast)[1].name
"""What this version of transformers calls the cache: "past_key_values" before 5.24, then "cache"."""


class MetaLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config_class = MetaLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _no_split_modules = ("MetaLMDecoderLayer", "MetaLMEncoder", "MetaLMPretrainedEncoder")
    _skip_keys_device_placement = ("cache", "past_key_values")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MetaLMDecoderLayer, "attentions": MetaLMCausalAttention}  # noqa: RUF012

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Ask the `metalm` package for its attention when that is wanted; without it, use SDPA."""
        if attn_implementation == INTERVAL_ATTENTION:
            try:
                from metalm.kernels.adapters import register_interval_attention
            except ImportError:
                logger.warning_once(f"{INTERVAL_ATTENTION} needs the metalm package; using sdpa instead")
                attn_implementation = "sdpa"
            else:
                register_interval_attention()
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As any model's; the encoders, which may read any token in a span, get new ones, too."""
        resized = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if (size := self.config.vocab_size) > self.config.encoder_vocab_size:
            for encoder in self.modules():
                if isinstance(encoder, MetaLMEncoder):
                    old = encoder.token_embedding
                    new = self._get_resized_embeddings(old, size, mean_resizing=mean_resizing)
                    encoder.token_embedding = new.requires_grad_(old.weight.requires_grad)
            self.config.encoder_vocab_size = size
        return resized

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            init.ones_(module.weight)
        elif module is self.get_input_embeddings() or module is self.get_output_embeddings():
            scaled = self.config.scale_embedding
            init.normal_(module.weight, std=self.config.hidden_size**-0.5 if scaled else EMBEDDING_STD)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=EMBEDDING_STD)
        elif isinstance(module, nn.Linear):
            gain = module.init_gain if isinstance(module, MetaLMLinear) else 1.0
            init.xavier_normal_(module.weight, gain=gain)
        if isinstance(module, nn.LayerNorm | nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)


class MetaLMModel(MetaLMPreTrainedModel):
    """Decoder and encoders, without the output layer."""

    def __init__(self, config: MetaLMConfig) -> None:
        super().__init__(config)
        _warn_of_newer_transformers(config.proved_on_transformers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            MetaLMDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        pre_norm = config.normalization == "pre_ln"
        self.final_norm = (
            build_norm(config.norm, config.hidden_size, config.norm_eps) if pre_norm else nn.Identity()
        )
        self.encoders = MetaLMEncoders(config)
        self.gradient_checkpointing = False
        self.post_init()

    def spans(
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        audio_values: Tensor | None = None,
        span_input_ids: Tensor | None = None,
        span_encoders: Tensor | None = None,
        span_numbers: Tensor | None = None,
    ) -> Spans | None:
        """The spans that a forward's arguments describe, None if there are none.

        Raises:
            ValueError: some of the span tensors are missing, or all beside clips, or the image tokens make no
                whole images.
        """
        given = (span_input_ids, span_encoders, span_numbers)
        if all(tensor is not None for tensor in given):
            return Spans(*given)
        if any(tensor is not None for tensor in given):
            raise ValueError("span_input_ids, span_encoders and span_numbers belong together")
        if audio_values is not None:
            raise ValueError("audio_values need span_input_ids, span_encoders and span_numbers beside them")
        if pixel_values is None:
            return None
        if inputs_embeds is not None:
            image_token = self.embed_tokens.weight[self.config.image_token_id]
            is_image = (inputs_embeds == image_token).all(dim=-1)
            input_ids = torch.where(is_image, self.config.image_token_id, self.config.pad_token_id)
        return spans_of_images(input_ids, self.config)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """What the decoder sees of images that are encoded by themselves.

        Args:
            pixel_values: [images, 3, height, width], x / 127.5 - 1 of 8-bit pixels.

        Returns:
            [images, patches, D], both as `last_hidden_state` and as `pooler_output`.

        Raises:
            ValueError: the model has no image encoder.
        """
        vectors = self.encoders.encode_images(pixel_values, self.embed_tokens.weight.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=vectors, pooler_output=vectors)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        audio_values: Tensor | None = None,
        span_input_ids: Tensor | None = None,
        span_encoders: Tensor | None = None,
        span_numbers: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> BaseModelOutputWithPast:
        """Run the decoder over tokens and docked vectors.

        Args:
            input_ids: [B, S] int64, with the image token wherever an encoder's vector is docked.
            attention_mask: [B, S] with 0 at padding; positions count from the first real token.
            position_ids: [B, S] or [1, S].
            cache: a dynamic or static one; `past_key_values` is its name in older versions of transformers.
            inputs_embeds: [B, S, D] in place of `input_ids`, as `get_input_embeddings()` gives them. Without
                span tensors, images stand where the image token's embedding does.
            pixel_values: [images, 3, height, width], x / 127.5 - 1 of 8-bit pixels, row after row.
            audio_values: [clips, values], features end to end, row after row; with span tensors only.
            span_input_ids, span_encoders, span_numbers: [B, S] each, see `Spans`. Without them every
                `num_patches` image tokens are one image of `pixel_values`.
            use_cache: answer with a cache.
            output_attentions, output_hidden_states: of all layers, for the decorator.
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: bounds of packed sequences, for flash
                attention.

        Raises:
            TypeError: an argument is unknown.
            ValueError: both or none of `input_ids` and `inputs_embeds`; two caches; spans and images do not
                match.
        """
        cache = _one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        spans = self.spans(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            audio_values=audio_values,
            span_input_ids=span_input_ids,
            span_encoders=span_encoders,
            span_numbers=span_numbers,
        )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        hidden = inputs_embeds
        if self.config.scale_embedding and not self.config.scale_docked_vectors:
            hidden = hidden * self._scale(hidden)
        if spans is not None:
            hidden = self.encoders.dock(hidden, spans, pixel_values, audio_values)

        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache = None  # a layer that is run again for its gradients would write to it twice
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(hidden, attention_mask, cache)
        hidden, rotary = self._place(hidden, position_ids)
        # By position: versions of transformers differ in what they call the cache.
        mask = create_causal_mask(
            self.config,
            hidden,
            attention_mask,
            cache,
            position_ids=position_ids,
            block_sequence_ids=self._bidirectional_blocks(spans, cache),
        )
        packing = {
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
            "max_length_q": max_length_q,
            "max_length_k": max_length_k,
        }
        for layer in self.layers:
            hidden = layer(hidden, mask, cache=cache, rotary=rotary, **packing)
        return BaseModelOutputWithPast(self.final_norm(hidden), cache)

    def _place(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The input with its positions, and what turns queries and keys where positions are rotary."""
        config = self.config
        if config.scale_docked_vectors:
            hidden = hidden * self._scale(hidden)  # tokens and docked vectors alike
        if config.positions == "learned":
            return hidden + self.embed_positions(position_ids), None
        if config.positions == "sinusoidal":
            return hidden + sinusoidal_positions(position_ids, config.hidden_size).to(hidden.dtype), None
        cosines, sines = rotary_factors(position_ids, config.head_dim, config.rope_parameters)
        return hidden, (cosines.to(hidden.dtype), sines.to(hidden.dtype))

    def _scale(self, vectors: Tensor) -> float:
        """The square root of the hidden size, rounded to the vectors' dtype if the configuration says so."""
        scale = self.config.hidden_size**0.5
        if self.config.scale_embedding == "rounded":
            scale = torch.tensor(scale, device="cpu").to(vectors.dtype).item()
        return scale

    def _bidirectional_blocks(self, spans: Spans | None, cache: Cache | None) -> Tensor | None:
        """The number of each column's span from the cache's beginning, -1 outside, [B, past + S]."""
        if spans is None or self.config.spans == "causal":
            return None
        if "flash" in self.config._attn_implementation:
            raise ValueError("spans that are bidirectional in the decoder need attn_implementation='sdpa'")
        past = 0 if cache is None else int(cache.get_seq_length())
        return functional.pad(spans.numbers.masked_fill(spans.numbers == 0, -1), (past, 0), value=-1)


class MetaLMForConditionalGeneration(MetaLMPreTrainedModel, GenerationMixin):
    """MetaLM with its output layer, which the configuration may tie to the decoder's embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MetaLMConfig) -> None:
        super().__init__(config)
        self.model = MetaLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        audio_values: Tensor | None = None,
        span_input_ids: Tensor | None = None,
        span_encoders: Tensor | None = None,
        span_numbers: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given; arguments as `MetaLMModel.forward`, and:

        Args:
            labels: [B, S] int64, `input_ids` with -100 where nothing is to be predicted: padding, and
                the tokens inside a span after its first.
            logits_to_keep: so many last positions, or the positions of a vector; 0 for all.
            num_items_in_batch: what the summed loss is divided by; None: the mean over the labels.
            kwargs: `shift_labels` [B, S], in place of `labels`, already moved to the positions that predict
                them. It has no name above: Trainer evaluates only where it is given all labels that have.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            audio_values=audio_values,
            span_input_ids=span_input_ids,
            span_encoders=span_encoders,
            span_numbers=span_numbers,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        cache = outputs.get(CACHE_NAME)
        return CausalLMOutputWithPast(loss, logits, cache, outputs.hidden_states, outputs.attentions)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As `MetaLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def generate(
        self,
        *args: Any,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As any model's; the cache may have its older or its newer name in every version of transformers."""
        cache = _one_cache(cache, past_key_values)
        return super().generate(*args, **({} if cache is None else {CACHE_NAME: cache}), **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        audio_values: Tensor | None = None,
        span_input_ids: Tensor | None = None,
        span_encoders: Tensor | None = None,
        span_numbers: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The next forward's inputs; spans and media only while their positions are not in the cache."""
        cache = _one_cache(cache, past_key_values)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE_NAME: cache}, **kwargs
        )
        spans = self.model.spans(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            audio_values=audio_values,
            span_input_ids=span_input_ids,
            span_encoders=span_encoders,
            span_numbers=span_numbers,
        )
        start = 0 if cache is None else int(cache.get_seq_length())
        if spans is None or start >= spans.numbers.shape[1]:
            return inputs
        embedded = inputs.get("inputs_embeds")
        stop = start + (inputs["input_ids"] if embedded is None else embedded).shape[1]
        fed = spans.columns(start, stop)
        media = {"pixel_values": pixel_values, "audio_values": audio_values}
        for (name, values), starts in zip(media.items(), spans.media_starts(self.config), strict=True):
            if values is not None:
                column = starts.nonzero()[:, 1]
                media[name] = values[(column >= start) & (column < stop)]
        if self.config.spans == "bidirectional":
            # For a static cache transformers makes a causal mask here; the forward knows the spans.
            inputs["attention_mask"] = kwargs.get("attention_mask")
        return inputs | media | fed.tensors()

    @staticmethod
    def create_masks_for_generate(config: MetaLMConfig, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """The mask of a static cache, drawn before the forward; intervals are made in the forward."""
        if config._attn_implementation == INTERVAL_ATTENTION:
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat each row for its beams, its images and its clips together."""
        media = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "audio_values")}
        if any(values is not None for values in media.values()):
            names = ("inputs_embeds", "span_input_ids", "span_encoders", "span_numbers")
            given = {name: model_kwargs.get(name) for name in names}
            spans = self.model.spans(input_ids=input_ids, **media, **given)
            for (name, values), starts in zip(media.items(), spans.media_starts(self.config), strict=True):
                if values is not None:
                    rows = values.split(starts.sum(dim=1).tolist())
                    media[name] = torch.cat([row for row in rows for _ in range(expand_size)])
            model_kwargs |= spans.tensors()
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, model_kwargs | {n: values for n, values in media.items() if values is not None}


def _warn_of_newer_transformers(proved: str | None) -> None:
    """Say once that transformers is of a newer minor version than what the folder was proved on."""
    if proved is not None and _minor(transformers_version) > _minor(proved):
        logger.warning_once(
            f"This MetaLM was proved on transformers {proved}, this is {transformers_version}; should its "
            f"answers look wrong, use {proved}, or tools/refresh_export.py of the metalm package"
        )


def _minor(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that was given under either of its names.

    Raises:
        ValueError: two were given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are names of the same argument: give one of them")
    return past_key_values if cache is None else cache


def _positions(hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """[B, S] or [1, S], counted from each row's first real token."""
    length = hidden.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
    past = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=hidden.device) + past)[None]


__all__ = ["MetaLMForConditionalGeneration", "MetaLMModel", "MetaLMPreTrainedModel"]
