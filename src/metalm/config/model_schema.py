"""The model's part of the schema: decoder, encoders, and what encoders read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from metalm.config.section import Name, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Section
from metalm.config.training_schema import TrainableSection

Normalization = Literal["deepnorm", "pre_ln"]
"""Where a layer normalises: after each residual sum with DeepNorm's weights, or before each branch."""
Norm = Literal["layer_norm", "rms_norm"]
Activation = Literal["gelu", "gelu_tanh", "swiglu", "geglu_tanh"]
"""Of the feed-forward layers; `swiglu` and `geglu_tanh` have a gate: their first layer is twice as wide."""
GATED = ("swiglu", "geglu_tanh")
Positions = Literal["sinusoidal", "learned", "rope"]
SpanAttention = Literal["causal", "bidirectional"]

TEXT = "text"
"""The modality whose parts are tokens."""
MEDIA_SECTIONS = ("image", "audio")
"""Modalities beside text, those of `metalm.modalities.MEDIA`. Each is a section of `EncoderConfig` that says
whether it `needs_pretrained` and has `num_patches`, the vectors of the largest image or clip."""


class RopeScalingConfig(Section):
    """Llama 3's stretch of the rotary wavelengths past the length that a model was pretrained with."""

    factor: Annotated[float, Field(ge=1)]
    """Long wavelengths are multiplied by this."""
    low_frequency_factor: Annotated[float, Field(gt=0)] = 1.0
    high_frequency_factor: Annotated[float, Field(gt=0)] = 4.0
    """Wavelengths below `original_positions` over this stay; those between the two factors blend."""
    original_positions: PositiveInt = 8192


class DecoderConfig(TrainableSection):
    """The causal decoder. The defaults are the paper's (arXiv 2206.06336)."""

    hidden_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    """Grouped-query attention: heads of keys and values. Default: as many as `num_heads`."""
    head_dim: PositiveInt | None = None
    """Width of one attention head. Default: the hidden size divided by `num_heads`."""
    ffn_hidden_size: PositiveInt | None = None
    """Default: four times the hidden size."""
    activation: Activation = "gelu"
    normalization: Normalization = "deepnorm"
    parallel_residual: bool = False
    """Whether attention and feed-forward of a layer read the same input, as in GPT-NeoX; with `pre_ln`."""
    norm: Norm = "layer_norm"
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    biases: bool = True
    """Whether the linear layers have biases; layer norms always have."""
    qkv_biases: bool = False
    """Biases of queries, keys and values where `biases` is false and no other layer has them."""
    positions: Positions = "sinusoidal"
    max_positions: PositiveInt | None = None
    """Rows of the table of `learned` positions."""
    rope_base: Annotated[float, Field(gt=1)] = 10_000.0
    rope_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How much of each head rotary positions turn: its first dimensions."""
    rope_scaling: RopeScalingConfig | None = None
    scale_embedding: bool | Literal["rounded"] = True
    """Whether token embeddings are multiplied by the square root of the hidden size. `rounded`: by that
    number in the precision of training, as in Gemma (55.5 in bf16 for 3072)."""
    scale_docked_vectors: bool = False
    """Whether docked vectors are multiplied so, too, as in the authors' later Kosmos-1. Their connectors then
    start that much smaller: the decoder's input starts alike."""
    tied_output: bool = True
    """Whether the output layer is the token embedding."""
    start: Literal["mirrored", "plain"] = "mirrored"
    """How a new decoder starts whose output layer is its scaled token embedding. `mirrored`: the gains of its
    last norm are 1 and -1 in turn. With `plain` they are 1, and each position predicts its own token with a
    confidence that grows with the width: see `src/metalm/model/README.md`. Loaded weights are as they are."""
    spans: SpanAttention = "causal"
    """How the decoder attends among the vectors of one span."""
    dropout: Probability = 0.0
    """Of attention weights, of what attention and feed-forward add, and of the embeddings; with `deepnorm`.
    What is dropped depends on the seed, the row and the step alone."""
    recompute: bool | Literal["selective"] = False
    """What the backward pass computes again instead of keeping it: less memory, slower. `true`: all but the
    layers' inputs. `selective`: what is large and made without a matrix product: what norms and activations
    give."""

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def attention_size(self) -> int:
        """Width of all queries, and of what is attended."""
        return self.num_heads * self.head_size

    @property
    def rotary_size(self) -> int:
        """Width of what rotary positions turn of a head."""
        return int(self.head_size * self.rope_share)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.activation in GATED

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def has_qkv_biases(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.biases or self.qkv_biases


class ImageConfig(Section):
    """Square images, cut into square patches, three channels."""

    needs_pretrained: ClassVar[bool] = False
    """Whether only encoders of transformers read it."""

    image_size: PositiveInt
    """Pixels per side."""
    patch_size: PositiveInt
    """Pixels per side."""

    @model_validator(mode="after")
    def _is_tiled(self) -> ImageConfig:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size = {self.image_size} is not divisible by patch_size = {self.patch_size}"
            )
        return self

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2


class AudioConfig(Section):
    """Clips of one channel. What a model reads of one, mel frames or samples, is padded to one shape."""

    needs_pretrained: ClassVar[bool] = True

    sampling_rate: PositiveInt
    """In hertz; clips of other rates are resampled."""
    min_samples: PositiveInt
    """Shorter clips have no vector."""
    max_samples: PositiveInt
    """Longer clips are cut here."""
    num_patches: PositiveInt
    """Vectors of a whole clip."""
    features: tuple[PositiveInt, ...]
    """Shape of what the model reads of a clip: frames and mel bins, or samples."""
    convolutions: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    """Kernel and stride of each layer that turns samples into vectors; a shorter clip then has fewer of them.
    Without any, every clip has `num_patches`."""
    masks_padding: bool = False
    """Whether the model attends to real vectors alone; else to the silence behind a short clip, too."""
    weights_per_patch: PositiveInt
    """Multiplications that make one vector, before the layers."""

    def count_patches(self, num_samples: int) -> int:
        """Vectors of a clip of so many samples."""
        if num_samples < self.min_samples:
            return 0
        if not self.convolutions:
            return self.num_patches
        length = min(num_samples, self.max_samples)
        for kernel, stride in self.convolutions:
            length = (length - kernel) // stride + 1
        return length


class PretrainedConfig(Section):
    """An encoder of transformers, from a local folder. Its sizes and input follow from the folder."""

    path: Path
    """Holds config.json, model.safetensors and, for images and audio preprocessor_config.json, for text
    tokenizer.json."""
    clip_seconds: PositiveFloat | None = None
    """Longest clip of a model that reads samples, such as Wav2Vec2; one of mel frames has its own."""
    image_size: PositiveInt | None = None
    """Pixels per side, where images are to be of others than the folder's; its positions are interpolated."""
    definition: dict[str, Any] = Field(default_factory=dict)
    """The model's config, filled in when a pipeline is read: a run goes on without the folder."""
    image_mean: tuple[float, float, float] | None = None
    """Of the pixels in 0..1, by channel; filled in, as is `image_std`."""
    image_std: tuple[float, float, float] | None = None
    processor: dict[str, Any] = Field(default_factory=dict)
    """How features are made of clips: the settings of transformers' feature extractor, filled in."""

    @property
    def model_type(self) -> str:
        """What transformers calls the kind of model."""
        return str(self.definition["model_type"])


class RelativeBiasConfig(Section):
    """T5's relative-position bias, one table for all layers; both values are *open* in the paper."""

    num_buckets: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    """Half of them for each direction, and half of those for one distance each."""
    max_distance: PositiveInt = 128
    """Distance in tokens from which all share the last bucket."""


class EncoderConfig(TrainableSection):
    """A bidirectional encoder of text. With `image` its spans are an image followed by a text prefix.

    With `pretrained` all sizes follow from the folder and are not given; an image or a clip then has no text
    prefix.
    """

    num_layers: NonNegativeInt
    """0: what it reads goes to the connector as it is embedded, such as patches through one linear map."""
    hidden_size: PositiveInt
    num_heads: PositiveInt
    ffn_hidden_size: PositiveInt | None = None
    num_kv_heads: PositiveInt | None = None
    """As the decoder's."""
    activation: Activation = "gelu"
    normalization: Normalization = "deepnorm"
    norm: Norm = "layer_norm"
    norm_eps: PositiveFloat = 1e-5
    biases: bool = True
    """Whether the layers' linear maps have biases; layer norms, patch embedding and connector always have."""
    max_text_positions: NonNegativeInt
    """Longest text of one span, in tokens of the encoder's tokenizer."""
    pretrained: PretrainedConfig | None = None
    positions: Literal["learned", "rope"] = "learned"
    """Of text; `rope` is for encoders without images. Positions of patches are learned."""
    rope_base: Annotated[float, Field(gt=1)] = 10_000.0
    relative_bias: RelativeBiasConfig | None = None
    """Added to the learned positions, in encoders of text."""
    image: ImageConfig | None = None
    audio: AudioConfig | None = None
    """Of an encoder from transformers, filled in."""
    joint_layers: PositiveInt | None = None
    """VLMo's feed-forwards: one for patches and one for text in every layer; in so many last layers also
    a joint one, that spans of an image with text go through. Default: one feed-forward for all elements."""
    trained_connector: bool = True
    """Whether the connector is trained, as it is by default beside frozen layers, too."""
    recompute: bool = False
    """As the decoder's."""
    dropout: Probability = 0.0
    """As the decoder's, with either normalisation."""
    connector: Literal["linear", "feed_forward", "detection"] = "linear"
    """`linear`: one projection (language-only setting). `feed_forward`: three layers with GELU, as wide
    as the decoder (vision-language setting; width and activation are open). `detection`: none, but the head
    of `training.replaced_tokens`, one logit per token."""

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forwards have a gate."""
        return self.activation in GATED

    @property
    def is_trained(self) -> bool:
        """Whether anything of it or of its connector is trained."""
        return super().is_trained or self.trained_connector

    def section(self, modality: str) -> ImageConfig | AudioConfig | None:
        """Of what it reads beside text, by modality."""
        return getattr(self, modality) if modality in MEDIA_SECTIONS else None

    @property
    def media(self) -> ImageConfig | AudioConfig | None:
        """What its spans begin with; None: text alone."""
        return next((found for name in MEDIA_SECTIONS if (found := self.section(name)) is not None), None)

    def feed_forwards(self, layer: int) -> tuple[str, ...]:
        """Names of the feed-forwards of a layer."""
        if self.joint_layers is None:
            return ("shared",)
        joint = layer >= self.num_layers - self.joint_layers
        return ("vision", "language", "joint") if joint else ("vision", "language")


class ModelConfig(Section):
    """Decoder, encoders by name, and the vocabulary that they share."""

    vocab_size: PositiveInt
    vocab_multiple: PositiveInt = 128
    """The embedding is padded to a multiple of this, on every topology alike."""
    decoder: DecoderConfig
    encoders: dict[Name, EncoderConfig] = Field(default_factory=dict)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
