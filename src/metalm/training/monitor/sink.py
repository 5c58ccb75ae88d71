"""What shows the figures of a run: the interface. A sink computes nothing and decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import numpy as np


class About(Enum):
    """What figures that are written together tell of."""

    STEPS = "the steps since the last line"
    HELD_OUT = "held-out losses"
    TASKS = "scores on tasks"
    APART = "time beside the steps"


class Sink:
    """A place where figures are shown; what it has no use for, it inherits and leaves out.

    Only the first rank has sinks. An OSError, such as of a full disk, is logged once and the run goes on;
    before the next call, `reopen` is called, or `begin` again where that is what failed.
    """

    def begin(self, first_step: int) -> None:
        """Open, at the start or after going back: what was shown of `first_step` and later is superseded."""

    def reopen(self) -> None:
        """Recover from a call that failed."""

    def write(self, step: int, figures: Mapping[str, float], about: About) -> None:
        """Show numbers of a step, by names such as `loss/all`."""

    def write_text(self, step: int, name: str, text: str) -> None:
        """Show a text, line breaks as they are."""

    def write_picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show pixels [height, width, 3] uint8."""

    def write_audio(self, step: int, name: str, samples: np.ndarray, sampling_rate: int) -> None:
        """Give samples [n] float32 in -1..1, one channel, to be heard."""

    def say(self, line: str) -> None:
        """Show a line to whoever has started the run."""

    def close(self) -> None:
        """Flush and close."""
