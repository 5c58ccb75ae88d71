"""The configuration of a run as frozen pydantic models that refuse unknown keys.

A field marked *open* has a value that the paper (arXiv 2206.06336) does not give; its default is ours.
Paths to be read are looked for beside the pipeline file first; all are relative to the folder in which the
command is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

Normalization = Literal["deepnorm", "pre_ln"]
"""Where a layer normalises: after each residual sum with DeepNorm's weights, or before each branch."""
Norm = Literal["layer_norm", "rms_norm"]
Activation = Literal["gelu", "gelu_tanh", "swiglu"]
"""Of the feed-forward layers; `swiglu` has a gate, so its first layer is twice as wide."""
Positions = Literal["sinusoidal", "learned", "rope"]
SpanAttention = Literal["causal", "bidirectional"]


TEXT = "text"
"""The modality whose parts are tokens."""
MEDIA_SECTIONS = ("image", "audio")
"""Modalities beside text, each a section of `EncoderConfig`."""


class Section(BaseModel):
    """Base of every section: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _one_line(path: Path) -> Path:
    if not str(path).isprintable():
        raise ValueError("a folder's name may not hold control characters")
    return path


class RunSection(Section):
    """Name and place of the run: everything it writes goes to `folder/name`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    folder: Annotated[Path, AfterValidator(_one_line)] = Path("runs")
    seed: NonNegativeInt = 1


class ParallelConfig(Section):
    """How ranks are laid out. The data-parallel size is the number of ranks divided by `tensor`."""

    tensor: PositiveInt = 1
    sequence_parallel: bool = False
    """Split what the decoder's layers keep between attention and feed-forward over the tensor ranks, too."""
    timeout_minutes: PositiveInt = 30
    """How long a collective may wait before the process group gives up."""


class DeepSpeedConfig(Section):
    """DeepSpeed JSON files, one per engine: see deepspeed_configs/README.md."""

    decoder: Path = Path("deepspeed_configs/decoder_zero1.json")
    encoders: Path = Path("deepspeed_configs/encoders_zero3.json")


class RopeScalingConfig(Section):
    """Llama 3's stretch of the rotary wavelengths past the length that a model was pretrained with."""

    factor: Annotated[float, Field(ge=1)]
    """Long wavelengths are multiplied by this."""
    low_frequency_factor: Annotated[float, Field(gt=0)] = 1.0
    high_frequency_factor: Annotated[float, Field(gt=0)] = 4.0
    """Wavelengths below `original_positions` over this stay; those between the two factors blend."""
    original_positions: PositiveInt = 8192


class DecoderConfig(Section):
    """The causal decoder. The defaults are the paper's (arXiv 2206.06336)."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    """Grouped-query attention: heads of keys and values. Default: as many as `num_heads`."""
    ffn_hidden_size: PositiveInt | None = None
    """Default: four times the hidden size."""
    activation: Activation = "gelu"
    normalization: Normalization = "deepnorm"
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
    rope_scaling: RopeScalingConfig | None = None
    scale_embedding: bool = True
    """Whether token embeddings are multiplied by the square root of the hidden size."""
    tied_output: bool = True
    """Whether the output layer is the token embedding."""
    spans: SpanAttention = "causal"
    """How the decoder attends among the vectors of one span."""
    dropout: Probability = 0.0
    """Of attention weights, of what attention and feed-forward add, and of the embeddings; with `deepnorm`.
    What is dropped depends on the seed, the row and the step alone."""
    recompute: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, slower."""

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
    definition: dict[str, Any] = {}
    """The model's config, filled in when a pipeline is read: a run goes on without the folder."""
    image_mean: tuple[float, float, float] | None = None
    """Of the pixels in 0..1, by channel; filled in, as is `image_std`."""
    image_std: tuple[float, float, float] | None = None
    processor: dict[str, Any] = {}
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


class EncoderConfig(Section):
    """A bidirectional encoder of text. With `image` its spans are an image followed by a text prefix.

    With `pretrained` all sizes follow from the folder and are not given; an image or a clip then has no text
    prefix.
    """

    num_layers: PositiveInt
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
    trained_layers: PositiveInt | Literal["all", "none"] = "all"
    """A number n trains the last n layers and the connector; `none`, the connector alone. Embeddings and
    lower layers stay as they were loaded."""
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

    def section(self, modality: str) -> ImageConfig | AudioConfig | None:
        """Of what it reads beside text, by modality."""
        return getattr(self, modality) if modality in MEDIA_SECTIONS else None

    @property
    def media(self) -> ImageConfig | AudioConfig | None:
        """What its spans begin with; None: text alone."""
        return next((found for name in MEDIA_SECTIONS if (found := self.section(name)) is not None), None)

    @property
    def num_frozen_layers(self) -> int:
        """Leading layers that are not trained."""
        if isinstance(self.trained_layers, int):
            return self.num_layers - self.trained_layers
        return 0 if self.trained_layers == "all" else self.num_layers

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
    encoders: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], EncoderConfig] = {}

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class SpanConfig(Section):
    """Text spans that are encoded bidirectionally (PAPER section 4)."""

    fraction: Probability = 0.25
    """Share of the row's text tokens that lie in spans."""
    min_length: PositiveInt = 64
    max_length: PositiveInt = 128


SHARD_URL_PATTERN = r"^(pipe:|https?://).*\{shard\}"
"""A template: the name of a shard stands in for `{shard}`."""


class SourceConfig(Section):
    """A folder of shards with an index."""

    path: Path
    url: Annotated[str, Field(pattern=SHARD_URL_PATTERN)] | None = None
    """Where the shards are, if `path` holds their index alone: `https://host/pile/{shard}`, or a shell
    command that writes a shard, `pipe:aws s3 cp s3://bucket/pile/{shard} -`. Each is read from its front."""
    readers: dict[str, str] = {}
    """Which encoder reads what, by modality, such as `{image: scene, text: scene}`: of text its random spans,
    of pairs the image or clip and, with `text`, a prefix of the caption. The decoder reads the rest itself,
    and text whose encoder the model lacks."""
    weight: PositiveFloat = 1.0
    """Share of the rows, relative to the other sources."""

    @property
    def has_random_spans(self) -> bool:
        """Whether an encoder reads random runs of its text, if it is text alone."""
        return set(self.readers) == {TEXT}


class DataConfig(Section):
    """What is read, and how it becomes rows."""

    tokenizer: Path
    """Folder or tokenizer.json written by tools/train_tokenizer.py."""
    sequence_length: PositiveInt
    lanes: PositiveInt = 64
    workers: NonNegativeInt = 1
    """Loader processes per data-parallel rank; 0 loads in the training process."""
    shuffle_window: PositiveInt = 256
    """Samples that a lane shuffles among."""
    chunk_samples: PositiveInt = 64
    """Consecutive samples that are read, permuted and dealt to lanes together."""
    mixture_unit: Literal["rows", "tokens"] = "rows"
    """What the sources' weights are shares of. Rows of pairs hold padding, rows of text do not."""
    max_consecutive_failures: PositiveInt = 100
    """Bad samples in a row that stop the run."""
    spans: SpanConfig = SpanConfig()
    sources: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], SourceConfig]
    evaluation: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], SourceConfig] = {}
    """Held-out sources; weights are ignored."""


class OptimizerConfig(Section):
    """AdamW. Betas, eps, decay and clipping are *open* in the language-only setting."""

    learning_rate: PositiveFloat = 6e-4
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    gradient_clipping: PositiveFloat = 1.0
    """Largest joint gradient norm over decoder and encoders."""


class ScheduleConfig(Section):
    """Linear warm-up from 0, then decay to `final_fraction` of the peak at the last step."""

    warmup_steps: NonNegativeInt = 3000
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final_fraction: Fraction = 0.0


class ReplacedTokensConfig(Section):
    """Replaced-token detection (ELECTRA, arXiv 2003.10555), which pretrains a text encoder.

    The model's decoder, which attends to whole documents, fills masked tokens in; its one encoder tells which
    tokens are not the original ones. The defaults are ELECTRA's.
    """

    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of a row's tokens that are masked."""
    detection_weight: PositiveFloat = 50.0
    """Of the encoder's mean loss over all tokens; that of the decoder over masked tokens has weight 1."""


class TrainingConfig(Section):
    """The optimisation. Gradient accumulation follows from the batch sizes and the ranks."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    """Rows per optimizer step."""
    micro_batch_size: PositiveInt
    """Rows per forward pass of one data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    deterministic: bool = False
    """Bit for bit the same on the same ranks and devices, at some cost in speed."""
    time_limit_minutes: PositiveFloat | None = None
    """Save and end with exit code 75 when the process is this old."""
    replaced_tokens: ReplacedTokensConfig | None = None
    """Train by replaced-token detection instead of the semi-causal objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()


class GuardConfig(Section):
    """What a run does about harm from inside."""

    spike_sigma: PositiveFloat | None = 6.0
    """A step whose loss or gradient norm is this many standard deviations above the mean is skipped."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Accepted steps that mean and deviation are taken over; before so many, nothing is a spike."""
    max_skipped_steps: PositiveInt = 16
    """After more than these in a row the run goes back to its last checkpoint, and on with later data."""
    max_rewinds: NonNegativeInt = 3
    """How often it does so before it gives up."""
    hang_minutes: PositiveFloat = 30.0
    """When no step ends for so long, every rank writes its stacks and ends with exit code 70."""
    drift_every_steps: PositiveInt = 1000
    """How often replicas of parameters are compared bit by bit."""
    slow_rank_ratio: Annotated[float, Field(gt=1)] = 2.0
    """A rank that takes this many times the median rank's time is named in the log."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are never removed."""
    background: bool = True
    """Write while training goes on; the last one, and that before a stop, are always waited for."""
    resume: Literal["auto", "required"] = "auto"
    """`required`: refuse to start where there is no checkpoint of this run."""


class InitializeConfig(Section):
    """Weights of other runs that a new run starts from. A run that has a checkpoint goes on from that."""

    decoder: Path | None = None
    """A checkpoint, or a run folder, whose newest is meant."""
    encoders: Path | None = None
    new: tuple[str, ...] = ()
    """Patterns of parameter names that need not be there, such as `encoders.audio.*`: they start afresh."""


class WandbConfig(Section):
    """Weights & Biases. Its key comes from the environment or from `wandb login`, never from a pipeline."""

    project: str = "metalm"
    entity: str | None = None
    """A user or a team; default: the key's."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: files in the run's `wandb` folder, for `wandb sync`."""


class PrometheusConfig(Section):
    """A text file `metalm_RUN.prom` of the newest figures."""

    folder: Path | None = None
    """Read by node exporter's textfile collector on the node of the first rank; default: the run's `logs`."""


class SinksConfig(Section):
    """Where figures are shown beside the terminal and `logs/metrics.jsonl`, which every run has."""

    tensorboard: bool = True
    wandb: WandbConfig | None = None
    prometheus: PrometheusConfig | None = None


class MonitorConfig(Section):
    """What is logged, and how often."""

    log_every_steps: PositiveInt = 10
    evaluate_every_steps: PositiveInt = 1000
    evaluation_rows: PositiveInt = 256
    """Rows per held-out source, the same ones each time."""
    sample_every_steps: PositiveInt = 1000
    num_samples: PositiveInt = 4
    sample_new_tokens: PositiveInt = 48
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in the training precision; default: looked up by device name, else not shown."""
    sinks: SinksConfig = SinksConfig()


class RunConfig(Section):
    """One complete run: what a pipeline YAML holds."""

    run: RunSection
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    initialize: InitializeConfig = InitializeConfig()
    guards: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
