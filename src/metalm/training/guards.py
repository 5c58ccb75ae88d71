"""Skip steps that would harm the model: losses or gradients that are not finite, or far off the usual.

Everything is decided on the device, from numbers that the step has anyway: a healthy step waits for
nothing that it did not wait for before.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.checkpoint.state import GuardState
from metalm.config import GuardConfig

FINE, NOT_FINITE, SPIKE = range(3)


class StepGuard:
    """Judges each step by the loss and gradient norm of the accepted steps before it."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._sigma = config.spike_sigma
        self._window = torch.zeros(2, config.spike_window, dtype=torch.float64, device=device)
        self._filled = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps so far by verdict; the first is of those that were accepted."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Decide on a step and remember it.

        Args:
            loss: mean over the trained positions of the global batch, a device scalar.
            norm: joint gradient norm before clipping; negative where it is not finite.

        Returns:
            FINE, NOT_FINITE or SPIKE, an int64 device scalar, the same on all ranks.

        Collective: all ranks, on the device.
        """
        found = torch.stack([loss.double(), norm.double()])
        verdict = torch.where(torch.isfinite(found).all() & (norm >= 0), FINE, NOT_FINITE)
        if self._sigma is not None:
            mean, deviation = self._window.mean(dim=1), self._window.std(dim=1)
            is_spike = (found > mean + self._sigma * deviation).any() & (self._filled >= self._size)
            verdict = torch.where((verdict == FINE) & is_spike, SPIKE, verdict)
        # Ranks may differ in the last bit of a norm: what one rank refuses, all refuse.
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
        accepted = verdict == FINE
        at = torch.arange(self._size, device=found.device) == self._filled % self._size
        self._window = torch.where(at & accepted, found[:, None], self._window)
        self._filled = self._filled + accepted
        self.skipped = self.skipped + torch.nn.functional.one_hot(verdict, 3)
        return verdict

    def reset(self) -> None:
        """Forget what is usual: the run does not go on from where it was."""
        self._filled = torch.zeros_like(self._filled)

    def state(self) -> GuardState:
        """For `state.json`. Waits for the device."""
        content = {
            "window": self._window.tolist(),
            "filled": int(self._filled),
            "skipped": self.skipped.tolist(),
        }
        return GuardState.model_validate(content)

    def load(self, state: GuardState) -> None:
        """Go on from a saved state. A window of another length starts empty."""
        self.skipped.copy_(torch.tensor(state.skipped))
        if len(state.window[0]) == self._size:
            self._window.copy_(torch.tensor(state.window, dtype=torch.float64))
            self._filled.fill_(state.filled)

    @property
    def _size(self) -> int:
        return self._window.shape[1]
