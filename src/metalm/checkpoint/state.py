"""What a run has reached, as `state.json` of a checkpoint holds it: one schema for all who write it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from metalm.errors import CheckpointError

STATE_NAME = "state.json"

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Record(BaseModel):
    """Base of all records: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Progress(Record):
    """How much the run has learnt from."""

    trained_tokens: Annotated[Finite, Field(ge=0)] = 0.0
    """Positions that a loss was taken of, over all steps."""


class GuardState(Record):
    """What the step guard knows of earlier steps."""

    sources: tuple[str, ...] = ()
    """Names of the sources that the window tells apart."""
    window: tuple[tuple[Finite, ...], ...]
    """Of the last accepted steps: gradient norms; of each source the sums of losses, then the counts."""
    filled: Count
    """Accepted steps so far."""
    skipped: tuple[Count, Count, Count]
    """Steps so far by verdict; the first is of those that were accepted."""


class WrittenBy(Record):
    """The layout of the ranks that wrote the checkpoint."""

    tensor: Annotated[int, Field(gt=0)]
    context: Annotated[int, Field(gt=0)] = 1
    data: Annotated[int, Field(gt=0)]


class EngineCounters(Record):
    """What a DeepSpeed engine counts."""

    global_steps: Count
    skipped_steps: Count


class RunFacts(Record):
    """What the run knows of itself beside its engines."""

    progress: Progress = Progress()
    tokenizer: str | None = None
    """Fingerprint of the tokenizer that it was trained with; None: of none yet."""
    guard: GuardState | None = None
    origin: str | None = None
    """Where the weights were converted from."""


class RunState(RunFacts):
    """`state.json`. The last four are by component: `decoder` and, where the model has them, `encoders`."""

    step: Count
    """Optimizer steps done."""
    topology: WrittenBy
    zero_stages: dict[str, Annotated[int, Field(ge=0, le=3)]]
    optimizer_steps: dict[str, Annotated[Finite, Field(ge=0)]]
    """Updates that Adam has made."""
    engine_counters: dict[str, EngineCounters]

    @model_validator(mode="after")
    def _describes_each_component(self) -> Self:
        if not self.zero_stages.keys() == self.optimizer_steps.keys() == self.engine_counters.keys():
            raise ValueError("zero_stages, optimizer_steps and engine_counters are of different components")
        return self

    @classmethod
    def of_weights(cls, components: Iterable[str], facts: RunFacts) -> RunState:
        """The state of a checkpoint that was made from weights alone: a run begins there."""
        names = tuple(components)
        return cls(
            **dict(facts),
            step=0,
            topology=WrittenBy(tensor=1, data=1),
            zero_stages=dict.fromkeys(names, 0),
            optimizer_steps=dict.fromkeys(names, 0.0),
            engine_counters=dict.fromkeys(names, EngineCounters(global_steps=0, skipped_steps=0)),
        )

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


def parse_state(content: bytes, origin: str) -> RunState:
    """The state that a file holds.

    Args:
        content: of the file.
        origin: its name, for the message.

    Raises:
        CheckpointError: it is not of this schema.
    """
    try:
        return RunState.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"{origin} is not the state of a run: {first_mistake(error)}") from None


def first_mistake(error: ValidationError) -> str:
    """The first of a validation's mistakes, in one line."""
    problem: Any = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])
