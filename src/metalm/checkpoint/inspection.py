"""Look into a checkpoint: what is in it, and how two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from metalm.checkpoint.reader import CheckpointReader
from metalm.errors import CheckpointError
from metalm.progress import Phase


@dataclass(frozen=True)
class Difference:
    """Of one parameter in two checkpoints."""

    component: str
    name: str
    largest: float
    """Largest absolute difference; infinite where one lacks it or the shapes differ."""
    relative: float
    """Norm of the difference over the norm of the first."""


def describe_checkpoint(reader: CheckpointReader) -> str:
    """Step, layout, components and sizes, a line each."""
    files, state = reader.files, reader.state
    lines = [
        f"{'step':<14}{reader.step}",
        f"{'written by':<14}tensor {state.topology.tensor} x data {state.topology.data}",
        f"{'files':<14}{len(files)}, {sum(record.size for record in files.values()) / 2**20:,.1f} MiB",
    ]
    for component in reader.components():
        shapes = reader.parameters(component)
        count = sum(math.prod(shape) for shape in shapes.values())
        lines.append(
            f"{component:<14}{len(shapes)} parameters, {count:,} values, "
            f"ZeRO {state.zero_stages[component]}, "
            f"{state.optimizer_steps[component]:.0f} updates"
        )
    return "\n".join(lines)


def compare_checkpoints(
    first: CheckpointReader, second: CheckpointReader, state: str
) -> Iterator[Difference]:
    """Every parameter of either that has the state, one at a time.

    Raises:
        CheckpointError: none has it.
    """
    num_compared = 0
    for component in dict.fromkeys([*first.components(), *second.components()]):
        shapes = [
            {
                name: shape
                for name, shape in reader.parameters(component).items()
                if state in reader.states(component, name)
            }
            if component in reader.components()
            else {}
            for reader in (first, second)
        ]
        names = dict.fromkeys([*shapes[0], *shapes[1]])
        num_compared += len(names)
        for name in Phase.over(f"comparing the {component}", names, "parameters"):
            if shapes[0].get(name) != shapes[1].get(name):
                yield Difference(component, name, math.inf, math.inf)
                continue
            one, two = (reader.read(component, name, state) for reader in (first, second))
            norm = torch.linalg.vector_norm(one - two)
            relative = float(norm / torch.linalg.vector_norm(one).clamp(min=1e-30))
            yield Difference(component, name, float((one - two).abs().max()), relative)
    if not num_compared:
        raise CheckpointError(f"neither {first.folder} nor {second.folder} holds a state {state!r}")
