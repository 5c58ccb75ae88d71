"""The configuration of a run as frozen pydantic models that refuse unknown keys.

A field marked *open* has a value that the paper (arXiv 2206.06336) does not give; its default is ours.
Paths are relative to the folder in which the command is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

Normalization = Literal["deepnorm", "pre_ln"]
SourceKind = Literal["text", "image_text"]


class Section(BaseModel):
    """Base of every section: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RunSection(Section):
    """Name and place of the run: everything it writes goes to `folder/name`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    folder: Path = Path("runs")
    seed: NonNegativeInt = 1


class ParallelConfig(Section):
    """How ranks are laid out. The data-parallel size is the number of ranks divided by `tensor`."""

    tensor: PositiveInt = 1
    timeout_minutes: PositiveInt = 30
    """How long a collective may wait before the process group gives up."""


class DeepSpeedConfig(Section):
    """DeepSpeed JSON files, one per engine: see deepspeed_configs/README.md."""

    decoder: Path = Path("deepspeed_configs/decoder_zero1.json")
    encoders: Path = Path("deepspeed_configs/encoders_zero3.json")


class DecoderConfig(Section):
    """The causal decoder (PAPER section 4 and 5)."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    ffn_hidden_size: PositiveInt | None = None
    """Default: four times the hidden size."""
    normalization: Normalization = "deepnorm"

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.ffn_hidden_size or 4 * self.hidden_size


class ImageConfig(Section):
    """Square images, cut into square patches, three channels."""

    image_size: PositiveInt
    """Pixels per side."""
    patch_size: PositiveInt
    """Pixels per side."""

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2


class RelativeBiasConfig(Section):
    """T5's relative-position bias, one table for all layers; both values are *open* in the paper."""

    num_buckets: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    """Half of them for each direction, and half of those for one distance each."""
    max_distance: PositiveInt = 128
    """Distance in tokens from which all share the last bucket."""


class EncoderConfig(Section):
    """A bidirectional encoder. With `image` its spans are an image followed by a text prefix."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    ffn_hidden_size: PositiveInt | None = None
    normalization: Normalization = "deepnorm"
    max_text_positions: PositiveInt
    """Longest text of one span, in tokens."""
    relative_bias: RelativeBiasConfig | None = None
    """Added to the learned positions, in encoders of text."""
    image: ImageConfig | None = None
    joint_layers: PositiveInt | None = None
    """VLMo's feed-forwards: one for patches and one for text in every layer; in so many last layers also
    a joint one, that spans of an image with text go through. Default: one feed-forward for all elements."""
    trained_layers: PositiveInt | Literal["all", "none"] = "all"
    """A number n trains the last n layers and the connector; `none`, the connector alone. Embeddings and
    lower layers stay as they were loaded."""
    connector: Literal["linear", "feed_forward"] = "linear"
    """`linear`: one projection (language-only setting). `feed_forward`: three layers with GELU, as wide
    as the decoder (vision-language setting; width and activation are open)."""

    @property
    def feed_forward_size(self) -> int:
        """Width of the feed-forward layers."""
        return self.ffn_hidden_size or 4 * self.hidden_size

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


class SourceConfig(Section):
    """A folder of shards with an index."""

    path: Path
    kind: SourceKind
    encoder: str | None = None
    """The encoder of this source's spans. Text without one is plain causal; pairs need one with `image`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the rows, relative to the other sources."""


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

    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0
    """Largest joint gradient norm over decoder and encoders."""


class ScheduleConfig(Section):
    """Linear warm-up from 0, then decay to `final_fraction` of the peak at the last step."""

    warmup_steps: NonNegativeInt = 3000
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final_fraction: Fraction = 0.0


class TrainingConfig(Section):
    """The optimisation. Gradient accumulation follows from the batch sizes and the ranks."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    """Rows per optimizer step."""
    micro_batch_size: PositiveInt
    """Rows per forward pass of one data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are never removed."""


class MonitorConfig(Section):
    """What is logged, and how often."""

    log_every_steps: PositiveInt = 10
    evaluate_every_steps: PositiveInt = 1000
    evaluation_rows: PositiveInt = 256
    """Rows per held-out source, the same ones each time."""
    sample_every_steps: PositiveInt = 1000
    num_samples: PositiveInt = 4
    sample_new_tokens: PositiveInt = 48
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak of one device in the training precision; default: looked up by device name, else not shown."""


class RunConfig(Section):
    """One complete run: what a pipeline YAML holds."""

    run: RunSection
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
