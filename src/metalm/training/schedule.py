"""The learning rate as a pure function of the step: resuming needs no state of it.

DeepSpeed's own warm-up schedules use their first rate, 0, for two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from metalm.config import ScheduleConfig

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "one_minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""What is left of the peak, by how much of the decay is done."""


def learning_rate(step: int, peak: float, total_steps: int, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step` (the first is 1): linear warm-up to the peak, the peak, then decay.

    The decay reaches `final_fraction * peak` at `total_steps` and stays there.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    decay_steps = schedule.decay_steps or max(1, total_steps - schedule.warmup_steps)
    progress = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / decay_steps))
    shape = _SHAPES[schedule.decay](progress)
    return peak * (schedule.final_fraction + (1.0 - schedule.final_fraction) * shape)
