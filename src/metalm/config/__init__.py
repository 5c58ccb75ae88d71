"""What a run is: schema, loading and the rules that hold across sections."""

from metalm.config.augmentation_schema import AugmentationConfig
from metalm.config.load import config_content, load_config, write_config
from metalm.config.model_schema import (
    AudioConfig,
    DecoderConfig,
    EncoderConfig,
    ImageConfig,
    ModelConfig,
    PretrainedConfig,
    RelativeBiasConfig,
    RopeScalingConfig,
)
from metalm.config.schema import (
    AverageConfig,
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    InitializeConfig,
    KeepBestConfig,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    ReplacedTokensConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    SpanConfig,
    TrainingConfig,
)
from metalm.config.training_schema import AdapterConfig

__all__ = [
    "AdapterConfig",
    "AudioConfig",
    "AugmentationConfig",
    "AverageConfig",
    "CheckpointConfig",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "GuardConfig",
    "ImageConfig",
    "InitializeConfig",
    "KeepBestConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PretrainedConfig",
    "RelativeBiasConfig",
    "ReplacedTokensConfig",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "SpanConfig",
    "TrainingConfig",
    "config_content",
    "load_config",
    "write_config",
]
