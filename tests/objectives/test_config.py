"""An objective refuses a config that does not suit it, with a line for each reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalm.config import load_config
from metalm.errors import ConfigError
from metalm.objectives import build_objective
from metalm.objectives.replaced_tokens import ReplacedTokens
from metalm.objectives.semi_causal import SemiCausal

PIPELINES = Path(__file__).parents[2] / "pipelines"
SIZES = "model.encoders.text={num_layers: 1, hidden_size: 96, num_heads: 3, max_text_positions: 32}"


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PIPELINES.parent)


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        (
            "model.encoders.text.connector=detection",
            [
                "the configuration does not suit semi_causal",
                "model.encoders.text.connector: detection is for a run with training.replaced_tokens",
            ],
        ),
        (
            "training.replaced_tokens={}",
            [
                "the configuration does not suit replaced_tokens",
                "training.replaced_tokens trains one encoder; model.encoders has 2",
                "model.encoders.scene must be of text, our own, and trained in all",
                "model.encoders.text.connector must be detection, not linear",
                "is above model.encoders.text.max_text_positions = 32",
                "model.decoder.spans must be bidirectional",
                "data.sources.text must be text without readers of its own",
                "data.evaluation.scenes must be text without readers of its own",
            ],
        ),
    ],
)
def test_what_does_not_suit_an_objective_is_named_at_once(override: str, messages: list[str]) -> None:
    config = load_config(PIPELINES / "demo.yaml", [SIZES, override])
    with pytest.raises(ConfigError) as caught:
        build_objective(config)
    for message in messages:
        assert message in str(caught.value)


def test_rows_of_replaced_tokens_are_not_cut() -> None:
    overrides = ["parallel={tensor: 1, context: 2}", "training.replaced_tokens={}"]
    config = load_config(PIPELINES / "demo.yaml", [SIZES, *overrides])
    with pytest.raises(ConfigError, match="training.replaced_tokens: parallel.context must be 1, not 2"):
        build_objective(config)


def test_a_run_of_replaced_tokens_is_scored_on_no_tasks() -> None:
    config = load_config(PIPELINES / "pretrain_text_encoder_tiny.yaml", ["monitor.tasks={names: [boolq]}"])
    with pytest.raises(ConfigError, match="training.replaced_tokens: monitor.tasks must be null"):
        build_objective(config)


def test_the_objective_is_that_whose_section_the_config_has() -> None:
    assert isinstance(build_objective(load_config(PIPELINES / "demo.yaml")), SemiCausal)
    pretraining = load_config(PIPELINES / "pretrain_text_encoder.yaml")
    assert isinstance(build_objective(pretraining), ReplacedTokens)
