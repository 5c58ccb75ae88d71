"""A run goes on with more lanes: the saved lanes are split, at any step, and nothing is lost or read twice.

Whoever gives `data.lanes` a multiple of what it was announces it by that. With k times the lanes, lane l
stays lane l: it goes on in the midst of its document or row, with the documents that wait and all its counts.
From its next turn on (a block of samples, or a shard that is read from the front) it shares with k - 1 new
lanes, l + L, l + 2 L, ..., which begin at the next k - 1 turns. What was dealt stays dealt, so every sample
still comes once per epoch; the new lanes' numbers are new, so their random draws are, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metalm.data.lanes import LaneState, Mixture
from metalm.data.sample_stream import RowCounters
from metalm.errors import ConfigError


def growth(states: Mapping[int, LaneState], num_lanes: int) -> tuple[int, int]:
    """How many lanes come of each saved one, and of each to which samples were dealt.

    Args:
        states: of all lanes that were saved.
        num_lanes: there are to be.

    Raises:
        ConfigError: the saved ones cannot be split into so many.
    """
    state = next(iter(states.values()))
    saved = state.get("lanes", len(states))  # checkpoints from before lanes could be split hold all
    if num_lanes % saved:
        raise ConfigError(
            f"data.lanes is {num_lanes}, but the run was saved with {saved}: keep it, or give a multiple, "
            "into which the lanes are split"
        )
    return num_lanes // saved, num_lanes // saved * state.get("split", 1)


def grown(states: Mapping[int, LaneState], times: int, mixture: Mixture) -> dict[int, LaneState]:
    """The states of all lanes after each was split into so many.

    Args:
        states: of all lanes that were saved.
        times: the lanes that come of one.
        mixture: of the new lanes.
    """
    shared_by = mixture.split // times
    num_lanes = mixture.config.data.lanes
    found: dict[int, LaneState] = {}
    for lane, state in states.items():
        header = {"lanes": num_lanes, "split": mixture.split}
        found[lane] = {**state, **header}
        for child in range(1, times):
            sources = {}
            for name, saved in state["sources"].items():
                packer, order = saved["packer"], mixture.orders.get(name)
                if order is None:
                    continue
                block = order.later_turn(packer["place"][0], child * shared_by)
                begun: dict[str, Any] = {"waiting": []} if "waiting" in packer else {"consumed": 0}
                begun |= {"place": [block, 0], "counters": RowCounters().state()}
                sources[name] = {**saved, "packer": begun}
            found[lane + child * num_lanes // times] = {**state, **header, "rows": 0, "sources": sources}
    return found
