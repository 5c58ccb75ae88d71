"""The learning rate as a pure function of the step: resuming needs no state of it.

DeepSpeed's own warm-up schedules use their first rate, 0, for two steps.
"""

from __future__ import annotations

import math

from metalm.config import ScheduleConfig


def learning_rate(step: int, peak: float, total_steps: int, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step` (the first is 1): linear warm-up to the peak, then decay.

    The decay reaches `final_fraction * peak` at `total_steps` and stays there.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
    shape = 1.0 - progress if schedule.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final_fraction + (1.0 - schedule.final_fraction) * shape)
