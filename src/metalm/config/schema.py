"""The configuration of a run as frozen pydantic models that refuse unknown keys.

A field marked *open* has a value that the paper (arXiv 2206.06336) does not give; its default is ours.
Paths to be read are looked for beside the pipeline file first; all are relative to the folder in which the
command is started.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from metalm.config.augmentation_schema import AugmentationConfig
from metalm.config.model_schema import TEXT, ModelConfig
from metalm.config.section import (
    Fraction,
    Name,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)


def _one_line(path: Path) -> Path:
    if not str(path).isprintable():
        raise ValueError("a folder's name may not hold control characters")
    return path


def _run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            "it names a folder: letters, digits, dots, underscores and hyphens, first a letter or a digit: "
            "tuned-2; the folders above it are run.folder's"
        )
    return name


class RunSection(Section):
    """Name and place of the run: everything it writes goes to `folder/name`."""

    name: Annotated[str, AfterValidator(_run_name)]
    folder: Annotated[Path, AfterValidator(_one_line)] = Path("runs")
    seed: NonNegativeInt = 1


class ParallelConfig(Section):
    """How ranks are laid out. The data-parallel size is their number divided by `tensor` and `context`."""

    tensor: PositiveInt = 1
    context: PositiveInt = 1
    """So many ranks share the positions of the same rows, which are too long for one, by DeepSpeed-Ulysses'
    exchange around attention."""
    sequence_parallel: bool = False
    """Split what the decoder's layers keep between attention and feed-forward over the tensor ranks, too."""
    timeout_minutes: Annotated[int, Field(gt=0, le=366 * 24 * 60)] = 30
    """How long a collective may wait before the process group gives up; at most a year."""

    @property
    def rows_size(self) -> int:
        """Ranks that work on the same rows."""
        return self.tensor * self.context

    @property
    def length_multiple(self) -> int:
        """What the length of rows must be a multiple of, so that the ranks' shares of them are equal."""
        return self.context * (self.tensor if self.sequence_parallel else 1)


class DeepSpeedConfig(Section):
    """DeepSpeed JSON files, one per engine: see deepspeed_configs/README.md."""

    decoder: Path = Path("deepspeed_configs/decoder_zero1.json")
    encoders: Path = Path("deepspeed_configs/encoders_zero1.json")


class SpanConfig(Section):
    """Text spans that are encoded bidirectionally (PAPER section 4)."""

    fraction: Probability = 0.25
    """Share of the row's text tokens that lie in spans."""
    min_length: PositiveInt = 64
    max_length: PositiveInt = 128


Overflow = Literal["split", "cut_left", "cut_right"]
"""What becomes of a text of an example that is longer than its encoder reads: it goes to consecutive spans,
or loses its beginning or its end, which is counted."""

SHARD_URL_PATTERN = r"^(pipe:|https?://).*\{shard\}"
"""A template: the name of a shard stands in for `{shard}`."""


class SourceConfig(Section):
    """A folder of shards with an index."""

    path: Path
    url: Annotated[str, Field(pattern=SHARD_URL_PATTERN)] | None = None
    """Where the shards are, if `path` holds their index alone: `https://host/pile/{shard}`, or a shell
    command that writes a shard, `pipe:aws s3 cp s3://bucket/pile/{shard} -`. Each is read from its front."""
    readers: dict[str, str] = Field(default_factory=dict)
    """Which encoder reads what, by modality, such as `{image: scene, text: scene}`: of text its random spans,
    of pairs the image or clip and, with `text`, a prefix of the caption, of examples what is marked to be
    encoded. The decoder reads the rest itself, and text whose encoder the model lacks."""
    weight: PositiveFloat = 1.0
    """Share of the rows, relative to the other sources."""
    overflow: Overflow | None = None
    """Of examples, which need it: what becomes of texts that are longer than their encoder reads."""
    augmentation: AugmentationConfig | None = None
    """Of its images, in training alone."""

    @property
    def has_random_spans(self) -> bool:
        """Whether an encoder reads random runs of its text, if it is text alone."""
        return set(self.readers) == {TEXT} and self.overflow is None


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
    sources: dict[Name, SourceConfig]
    evaluation: dict[Name, SourceConfig] = Field(default_factory=dict)
    """Held-out sources; weights are ignored."""

    @property
    def example_source(self) -> SourceConfig | None:
        """The first source of examples, such as chats and tasks: it says who reads what is asked."""
        return next((one for one in self.sources.values() if one.overflow is not None), None)


class LearningRatesConfig(Section):
    """Peaks of components that do not have the common learning rate; all follow one schedule."""

    decoder: PositiveFloat | None = None
    encoders: dict[str, PositiveFloat] = Field(default_factory=dict)
    """By encoder, with its connector."""
    connectors: dict[str, PositiveFloat] = Field(default_factory=dict)
    """By encoder, of its connector alone."""

    def of(self, component: str, name: str) -> float | None:
        """The peak of a parameter.

        Args:
            component: `decoder` or `encoders`.
            name: as in the component's `named_parameters()`.
        """
        if component == "decoder":
            return self.decoder
        _, encoder, part, *_ = name.split(".")
        own = self.encoders.get(encoder)
        return self.connectors.get(encoder, own) if part == "connector" else own


class OptimizerConfig(Section):
    """AdamW. Betas, eps, decay and clipping are *open* in the language-only setting."""

    learning_rate: PositiveFloat = 6e-4
    learning_rates: LearningRatesConfig = LearningRatesConfig()
    """Of some components, such as `{decoder: 1.0e-5, connectors: {image: 1.0e-3}}`."""
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    gradient_clipping: PositiveFloat = 1.0
    """Largest joint gradient norm over decoder and encoders."""


class ScheduleConfig(Section):
    """Linear warm-up from 0, the peak, then decay to `final_fraction` of the peak at the last step."""

    warmup_steps: NonNegativeInt = 3000
    decay: Literal["linear", "cosine", "one_minus_sqrt", "constant"] = "linear"
    """`one_minus_sqrt`: one minus the square root of how much of the decay is done (arXiv 2405.18392)."""
    decay_steps: PositiveInt | None = None
    """The decay takes so many last steps, and the peak holds before it: warm-up, stable, decay (WSD).
    Default: all steps after the warm-up. A decay may start from any checkpoint of a stable phase: see
    `initialize.run`."""
    final_fraction: Fraction = 0.0


class AverageConfig(Section):
    """A moving average of the weights, in fp32, sharded and saved as the optimizer's moments are."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """What an update of step t leaves of the average, but no more than (1 + t) / (10 + t): the start is soon
    forgotten."""
    evaluate: bool = False
    """Measure held-out losses of the average, too, as `held_out/SOURCE/average`."""


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
    fp32_gradients: bool = False
    """In bf16, add the gradients of micro-batches up, and sum them over ranks, in fp32: two more bytes for
    each gradient, in memory and on its way."""
    deterministic: bool = False
    """Bit for bit the same on the same ranks and devices, at some cost in speed."""
    cuda_graphs: bool = True
    """Launch the layers of decoder and encoders whole, whose kernels would keep the host longer than the GPU:
    on CUDA, below ZeRO 3, without `recompute`, the decoder's where rows are on one rank. The values are the
    same; the log says for which micro-batches. A micro-batch's activations stay reserved between steps."""
    time_limit_minutes: PositiveFloat | None = None
    """Save and end with exit code 75 when the process is this old."""
    replaced_tokens: ReplacedTokensConfig | None = None
    """Train by replaced-token detection instead of the semi-causal objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    average: AverageConfig | None = None
    """Beside the weights that are trained; `convert_to_hf.py --average` exports it."""

    @property
    def adds_up_in_fp32(self) -> bool:
        """Whether gradients have another precision than the weights."""
        return self.fp32_gradients and self.precision == "bf16"


class GuardConfig(Section):
    """What a run does about harm from inside."""

    spike_sigma: PositiveFloat | None = 6.0
    """A step whose gradient norm is this many standard deviations above the mean is skipped, and one whose
    loss is so far above what the usual losses of its sources lead to expect."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Accepted steps that mean and deviation are taken over; before so many, nothing is a spike."""
    max_skipped_steps: PositiveInt = 16
    """After more than these in a row, or if the last step is skipped, the run goes back to the checkpoint
    from before them, and on with later data. Nothing is saved meanwhile."""
    max_rewinds: NonNegativeInt = 3
    """How often a start does so before it gives up."""
    hang_minutes: PositiveFloat = 30.0
    """When no step ends for so long, every rank writes its stacks and ends with exit code 70."""
    drift_every_steps: PositiveInt = 1000
    """How often replicas of parameters are compared bit by bit."""
    slow_rank_ratio: Annotated[float, Field(gt=1)] = 2.0
    """A rank that takes this many times the median rank's time, of those with the same work, is named in the
    log, where it matters."""


class KeepBestConfig(Section):
    """The checkpoint that is best by a held-out figure is never removed, and `checkpoints/best` names it."""

    figure: Annotated[str, Field(pattern=r"^held_out/.+")]
    """As it is logged, such as `held_out/text`."""
    direction: Literal["lowest", "highest"] = "lowest"


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are never removed."""
    keep_best: KeepBestConfig | None = None
    """Needs a checkpoint at each evaluation."""
    background: bool = True
    """Write while training goes on; the last one, and that before a stop, are always waited for."""
    resume: Literal["auto", "required"] = "auto"
    """`required`: refuse to start where there is no checkpoint of this run."""


class InitializeConfig(Section):
    """Other runs' checkpoints that a new run starts from. A run that has a checkpoint goes on from that.

    Each is a checkpoint, or a run folder, whose newest is meant.
    """

    run: Path | None = None
    """Go on from this one as its own run would, with weights, optimizer, step and place in the data: a second
    way from there, such as a decay out of a stable phase."""
    decoder: Path | None = None
    """Take the weights alone."""
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


class TasksConfig(Section):
    """Tasks that a run is scored on while it trains, on the same questions each time."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Task files, or names of those that come with MetaLM."""
    data: Path = Path("data/tasks")
    """Folder of all tasks' data."""
    every_steps: PositiveInt = 1000
    questions: PositiveInt = 64
    """Of each task, drawn from all."""
    shots: tuple[NonNegativeInt, ...] | None = None
    """Demonstrations, in the wording for prompts; default: as finetuned, without any."""
    batch_size: PositiveInt = 8
    """Documents that a data-parallel rank takes at once."""


class MonitorConfig(Section):
    """What is logged, and how often."""

    log_every_steps: PositiveInt = 10
    evaluate_every_steps: PositiveInt = 1000
    evaluation_rows: PositiveInt = 256
    """Rows per held-out source, the same ones each time."""
    sample_every_steps: PositiveInt = 1000
    num_samples: PositiveInt = 4
    sample_new_tokens: PositiveInt = 48
    tasks: TasksConfig | None = None
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in the training precision; default: looked up by device name, else not shown."""
    profile_steps: tuple[PositiveInt, ...] = ()
    """Steps whose traces torch's profiler writes to `profile/` of the run; neighbours make one trace."""
    profile_ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that write them."""
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
