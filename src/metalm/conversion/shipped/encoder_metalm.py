"""Encoders of MetaLM, and the span tensors that say which decoder position shows which encoder's vector.

Every vector of an encoder takes one decoder position, so spans are described beside `input_ids`, in
tensors of the same shape [B, S]. Shape letters: B rows, S positions, N docked positions, K spans of one
encoder, L elements of the longest of them, D width of the encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel
from transformers.masking_utils import create_bidirectional_mask

from .configuration_metalm import MetaLMConfig
from .layers_metalm import MetaLMEncoderLayer, build_norm

SPARE_ROWS = 2
"""Behind the spans of a compiled model, which does not know how many there are: of one row alone, attention
would have to know that (torch 2.11)."""


@dataclass(frozen=True)
class Spans:
    """What the encoders read, and where their vectors stand; all [B, S] int64."""

    input_ids: Tensor
    """The token that the encoder reads, plus `own_token_offset` if it has a tokenizer of its own; the image
    token where it reads an image or a clip."""
    encoders: Tensor
    """0: the decoder's own token. k: the k-th encoder in alphabetical order."""
    numbers: Tensor
    """Tells apart the spans of a row, from 1; 0 outside spans."""

    def columns(self, start: int, stop: int) -> Spans:
        """The spans of columns [start, stop), relative to `start`.

        Raises:
            ValueError: a span lies across a border.
        """
        for border in (start, stop):
            if 0 < border < self.numbers.shape[1]:
                left, right = self.numbers[:, border - 1], self.numbers[:, border]
                if bool(((left == right) & (right > 0)).any()):
                    raise ValueError(f"a span lies across position {border}, where the input was cut")
        return Spans(*(part[:, start:stop] for part in (self.input_ids, self.encoders, self.numbers)))

    def tensors(self) -> dict[str, Tensor]:
        """By the names that the model's forward has for them."""
        return {
            "span_input_ids": self.input_ids,
            "span_encoders": self.encoders,
            "span_numbers": self.numbers,
        }

    def media_starts(self, config: MetaLMConfig) -> tuple[Tensor, Tensor]:
        """[B, S] bool each: the first vector of each image, and of each clip."""
        before = functional.pad(self.numbers, (1, 0))[:, :-1]
        starts = (self.numbers != before) & (self.numbers > 0) & (self.input_ids == config.image_token_id)
        is_heard = torch.zeros_like(starts)
        for place, sizes in enumerate(config.encoders.values(), start=1):
            if sizes["audio"] is not None:
                is_heard = is_heard | (self.encoders == place)
        return starts & ~is_heard, starts & is_heard


def spans_of_images(input_ids: Tensor, config: MetaLMConfig) -> Spans:
    """Spans of a prompt whose every `num_patches` image tokens of a row are one image by itself.

    Raises:
        ValueError: the model has no image encoder, or a row's image tokens do not make whole images.
    """
    if config.image_encoder is None or config.image_token_id is None:
        raise ValueError("pixel_values were given, but this model has no image encoder")
    placeholder = input_ids.eq(config.image_token_id)
    count = placeholder.cumsum(dim=1)
    if bool((count[:, -1] % config.num_patches).any()):
        raise ValueError(
            f"an image takes {config.num_patches} image tokens, but the rows have {count[:, -1].tolist()}"
        )
    place = list(config.encoders).index(config.image_encoder) + 1
    numbers = torch.where(placeholder, 1 + (count - 1) // config.num_patches, 0)
    return Spans(input_ids, placeholder.long() * place, numbers)


class MetaLMEncoder(nn.Module):
    """A bidirectional encoder of text, or of images followed by text, with its connector."""

    reads_clips = False

    def __init__(self, config: MetaLMConfig, name: str) -> None:
        super().__init__()
        sizes = config.encoders[name]
        hidden = sizes["hidden_size"]
        self.config = config
        self.max_text, self.max_elements = sizes["max_text_positions"], _max_elements(sizes)
        self.patch_size = sizes["patch_size"]
        self.token_embedding = nn.Embedding(config.encoder_vocab_size, hidden)
        self.rope_base = sizes["rope_base"] if sizes["positions"] == "rope" else None
        self.head_size = hidden // sizes["num_attention_heads"]
        if self.rope_base is None:
            self.text_positions = nn.Embedding(sizes["max_text_positions"], hidden)
        if self.patch_size is not None:
            self.patch_embedding = nn.Linear(3 * self.patch_size**2, hidden)
            self.image_positions = nn.Embedding((sizes["image_size"] // self.patch_size) ** 2, hidden)
        self.bias_sizes, self.is_routed = sizes["relative_bias"], sizes["joint_layers"] is not None
        if self.bias_sizes is not None:
            self.relative_bias = nn.Embedding(self.bias_sizes["num_buckets"], sizes["num_attention_heads"])
        self.layers = nn.ModuleList(
            MetaLMEncoderLayer(config, name, layer) for layer in range(sizes["num_hidden_layers"])
        )
        pre_norm = sizes["normalization"] == "pre_ln"
        norm = build_norm(sizes["norm"], hidden, sizes["norm_eps"]) if pre_norm else nn.Identity()
        self.final_norm = norm
        self.connector = _connector(sizes["connector"], hidden, config.hidden_size)

    def forward(
        self, input_ids: Tensor, num_elements: Tensor, pixel_values: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Encode spans, padded to the longest.

        Args:
            input_ids: [K, L]; image tokens, if any, come first.
            num_elements: [K] real elements of each span.
            pixel_values: [images, 3, height, width] in [-1, 1], those of the spans that have one, in order.
            dtype: that the model computes in.

        Returns:
            [K, L, decoder's hidden size].
        """
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = index < num_elements[:, None]
        is_patch = real & (input_ids == self.config.image_token_id)
        num_patches = is_patch.sum(dim=1, keepdim=True)
        hidden = self.token_embedding(input_ids)
        if self.rope_base is None:
            last = self.text_positions.num_embeddings - 1
            hidden = hidden + self.text_positions((index - num_patches).clamp(min=0, max=last))
        if pixel_values is not None and self.patch_size is not None:
            patches = self.patch_embedding(self._cut(pixel_values.to(dtype)))
            patches = patches + self.image_positions.weight
            hidden = hidden.masked_scatter(is_patch[..., None], patches)
        options: dict[str, Any] = {}
        if self.rope_base is not None:
            exponents = torch.arange(0, self.head_size, 2, device=index.device).float() / self.head_size
            angles = index[:, None].float() / self.rope_base**exponents
            angles = torch.cat((angles, angles), dim=-1)[None, None]
            options["rotary"] = (angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype))
        if self.is_routed:
            joint = (num_patches > 0) & (num_patches < num_elements[:, None]) & real
            options["routes"] = {"joint": joint, "vision": is_patch, "language": ~is_patch}
        if self.bias_sizes is None:
            mask = create_bidirectional_mask(self.config, hidden, real)
        else:
            hidden_keys = torch.zeros_like(real, dtype=hidden.dtype).masked_fill(~real, float("-inf"))
            mask = hidden_keys[:, None, None] + self._bias(index)
            options["has_bias"] = True
        for layer in self.layers:
            hidden = layer(hidden, mask, **options)
        return self.connector(self.final_norm(hidden))

    def _bias(self, index: Tensor) -> Tensor:
        """[H, L, L] by T5's buckets of the distance of key and query (Raffel et al., 2020)."""
        half = self.bias_sizes["num_buckets"] // 2
        exact = half // 2
        distance = index - index[:, None]
        reach = distance.abs()
        widening = (reach.clamp(min=1).float() / exact).log() / math.log(
            self.bias_sizes["max_distance"] / exact
        )
        wide = (exact + (widening * (half - exact)).long()).clamp(max=half - 1)
        bucket = torch.where(reach < exact, reach, wide) + torch.where(distance > 0, half, 0)
        return self.relative_bias(bucket).permute(2, 0, 1)

    def _cut(self, pixels: Tensor) -> Tensor:
        """[images, 3, height, width] to patches [images, patches, rows * columns * channels]."""
        images, channels, height, width = pixels.shape
        patch = self.patch_size
        cells = pixels.view(images, channels, height // patch, patch, width // patch, patch)
        return cells.permute(0, 2, 4, 3, 5, 1).reshape(
            images, self.image_positions.num_embeddings, patch * patch * channels
        )


class MetaLMPretrainedEncoder(nn.Module):
    """An encoder that is a model of transformers, of text, images or clips, with its connector."""

    def __init__(self, config: MetaLMConfig, name: str) -> None:
        super().__init__()
        sizes = config.encoders[name]
        definition = dict(sizes["pretrained"])
        self.model = AutoModel.from_config(AutoConfig.for_model(definition.pop("model_type"), **definition))
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None
        self.token_offset, self.first_position = config.own_token_offset, sizes["first_position"]
        self.media_token = config.image_token_id
        self.max_text, self.max_elements = sizes["max_text_positions"], _max_elements(sizes)
        self.reads_images = sizes["image_size"] is not None
        self.num_patches = (sizes["image_size"] // sizes["patch_size"]) ** 2 if self.reads_images else 0
        self.image_mean, self.image_std = sizes["image_mean"], sizes["image_std"]
        self.audio, self.reads_clips = sizes["audio"], sizes["audio"] is not None
        self.connector = _connector(sizes["connector"], sizes["hidden_size"], config.hidden_size)

    def forward(
        self, input_ids: Tensor, num_elements: Tensor, media: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """As `MetaLMEncoder`; an image or a clip has no text behind it.

        Args:
            media: `pixel_values` of its images, or `audio_values` of its clips.

        Raises:
            ValueError: it has.
        """
        if media is not None and torch.compiler.is_compiling():
            media = torch.cat((media, media.new_zeros(SPARE_ROWS, *media.shape[1:])))
        if self.reads_clips:
            return self._encode_clips(input_ids, num_elements, media, dtype)
        if not self.reads_images:
            index = torch.arange(input_ids.shape[1], device=input_ids.device)
            found = self.model(
                input_ids=(input_ids - self.token_offset).clamp(min=0),
                attention_mask=(index < num_elements[:, None]).long(),
                position_ids=(index + self.first_position).expand_as(input_ids),
                token_type_ids=torch.zeros_like(input_ids),
            )
            return self.connector(found.last_hidden_state)
        is_checked = not torch.compiler.is_compiling()
        if media is None or (is_checked and bool((num_elements != self.num_patches).any())):
            raise ValueError("this encoder of images reads no text")
        mean, deviation = (
            torch.tensor(values, device=media.device)[:, None, None]
            for values in (self.image_mean, self.image_std)
        )
        pixels = ((media.float() + 1.0) / 2.0 - mean) / deviation
        found = self.model(pixel_values=pixels.to(dtype))
        return self.connector(found.last_hidden_state[:, -self.num_patches :])

    def _encode_clips(
        self, input_ids: Tensor, num_elements: Tensor, values: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[clips, vectors of a whole clip, decoder's hidden size]; a shorter clip has its own in front."""
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        is_text = (index < num_elements[:, None]) & (input_ids != self.media_token)
        if values is None or (not torch.compiler.is_compiling() and bool(is_text.any())):
            raise ValueError("this encoder of clips reads no text")
        shape = self.audio["features"]
        options = {}
        if self.audio["masks_padding"]:
            # The model takes a mask over samples and derives that of vectors: any length with as many does.
            samples = num_elements[: len(values)]
            for kernel, stride in reversed(self.audio["convolutions"]):
                samples = (samples - 1) * stride + kernel
            place = torch.arange(self.audio["max_samples"], device=values.device)
            options["attention_mask"] = (place < samples[:, None]).long()
        clips = values[:, : math.prod(shape)].unflatten(1, shape).to(dtype)
        found = self.model(input_values=clips, **options)
        return self.connector(found.last_hidden_state[:, -self.audio["num_patches"] :])


class MetaLMEncoders(nn.ModuleDict):
    """All encoders of a model, by name."""

    def __init__(self, config: MetaLMConfig) -> None:
        super().__init__(
            {
                name: MetaLMEncoder(config, name)
                if sizes["pretrained"] is None
                else MetaLMPretrainedEncoder(config, name)
                for name, sizes in config.encoders.items()
            }
        )
        self.config, self.image_token_id = config, config.image_token_id
        self.image_encoder, self.num_patches = config.image_encoder, config.num_patches

    def encode_images(self, pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
        """Images by themselves, [images, 3, height, width] to [images, patches, decoder's hidden size].

        Raises:
            ValueError: the model has no image encoder.
        """
        if self.image_encoder is None:
            raise ValueError("pixel_values were given, but this model has no image encoder")
        shape = (pixel_values.shape[0], self.num_patches)
        ids = torch.full(shape, self.image_token_id, device=pixel_values.device)
        return self[self.image_encoder](ids, ids.new_full(shape[:1], self.num_patches), pixel_values, dtype)

    def dock(
        self, hidden: Tensor, spans: Spans, pixel_values: Tensor | None, audio_values: Tensor | None
    ) -> Tensor:
        """Encode the spans and put their vectors where they stand in the decoder's input.

        Args:
            hidden: [B, S', decoder's hidden size]; S' may be longer than the spans' S, by generated tokens.
            spans: of the first S positions.
            pixel_values: of all images, row after row.
            audio_values: of all clips, row after row.

        Raises:
            ValueError: the number of images or clips is not that of their spans.
        """
        image_starts, clip_starts = spans.media_starts(self.config)
        _check_count("image", "pixel_values", image_starts, pixel_values)
        _check_count("clip", "audio_values", clip_starts, audio_values)
        for place, encoder in enumerate(self.values(), start=1):
            rows, columns = (spans.encoders == place).nonzero(as_tuple=True)  # [N], row after row
            media, starts = (
                (audio_values, clip_starts) if encoder.reads_clips else (pixel_values, image_starts)
            )
            if torch.compiler.is_compiling():
                if media is None and not encoder.max_text:
                    continue
            elif not len(rows):
                continue
            elif encoder.max_elements == encoder.max_text and bool((starts[rows, columns]).any()):
                raise ValueError("an image stands in a span of an encoder that reads no images")
            own = None if media is None else media[spans.encoders[starts] == place]
            ids, numbers = spans.input_ids[rows, columns], spans.numbers[rows, columns]
            vectors = _encode(encoder, ids, rows, numbers, own, hidden.dtype, hidden.shape[1])
            hidden = hidden.index_put((rows, columns), vectors.to(hidden.device, hidden.dtype))
        return hidden


def _check_count(noun: str, name: str, starts: Tensor, values: Tensor | None) -> None:
    given = 0 if values is None else values.shape[0]
    if torch.compiler.is_compiling():
        torch._assert_async(starts.sum() == given, f"the prompts and {name} have different {noun}s")
    elif int(starts.sum()) != given:
        raise ValueError(f"the prompts have {int(starts.sum())} {noun}(s), {name} has {given}")


def _encode(
    encoder: MetaLMEncoder | MetaLMPretrainedEncoder,
    ids: Tensor,
    rows: Tensor,
    numbers: Tensor,
    media: Tensor | None,
    dtype: torch.dtype,
    row_length: int,
) -> Tensor:
    """The vectors [N, ...] of the docked positions [N], through a padded grid of spans.

    The grid is as wide as the longest span. Where the model is compiled, which knows neither lengths nor
    whether there is a span, it is as wide as the longest that there can be, with spare rows.
    """
    position = torch.arange(len(rows), device=rows.device)
    before = (position - 1).clamp(min=0)
    is_first = (position == 0) | (rows != rows[before]) | (numbers != numbers[before])
    span = is_first.cumsum(dim=0) - 1
    (begins,) = is_first.nonzero(as_tuple=True)
    lengths = torch.zeros_like(begins).index_add(0, span, torch.ones_like(span))
    element = position - begins[span]
    if torch.compiler.is_compiling():
        padded = ids.new_zeros((len(begins) + SPARE_ROWS, min(row_length, encoder.max_elements)))
        lengths = functional.pad(lengths, (0, SPARE_ROWS), value=1)
    else:
        padded = ids.new_zeros((len(begins), int(lengths.max())))
    padded[span, element] = ids
    return encoder(padded, lengths, media, dtype)[span, element]


def _max_elements(sizes: dict[str, Any]) -> int:
    """Of the longest span that an encoder of these sizes reads."""
    num_patches = 0 if sizes["image_size"] is None else (sizes["image_size"] // sizes["patch_size"]) ** 2
    if sizes["audio"] is not None:
        num_patches = sizes["audio"]["num_patches"]
    return num_patches + sizes["max_text_positions"]


def _connector(kind: str, encoder_size: int, decoder_size: int) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(nn.Linear(encoder_size, decoder_size))
    return nn.Sequential(
        nn.Linear(encoder_size, decoder_size),
        nn.GELU(),
        nn.Linear(decoder_size, decoder_size),
        nn.GELU(),
        nn.Linear(decoder_size, decoder_size),
    )
