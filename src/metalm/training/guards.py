"""Skip steps that would harm the model: losses or gradients that are not finite, or far off the usual.

A loss is judged by what its sources lead to expect: the loss of a batch moves with their mixture, by chance
and by much, and no batch is refused for that. Everything is decided on the device, from numbers that the step
has anyway: a healthy step waits for nothing that it did not wait for before.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.checkpoint.state import GuardState
from metalm.config import GuardConfig

FINE, NOT_FINITE, SPIKE = range(3)


class StepGuard:
    """Judges each step by the losses and gradient norms of the accepted steps before it."""

    def __init__(self, config: GuardConfig, sources: Iterable[str], device: torch.device) -> None:
        """Begin without knowing what is usual.

        Args:
            sources: of the run, in the order in which `judge` is given their losses.
        """
        self._sigma = config.spike_sigma
        self._sources = tuple(sources)
        rows = 1 + 2 * len(self._sources)
        self._window = torch.zeros(rows, config.spike_window, dtype=torch.float64, device=device)
        """Of the last accepted steps: norms; of each source sums of losses, then counts."""
        self._filled = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps so far by verdict; the first is of those that were accepted."""
        self.judged: tuple[Tensor, ...] = ()
        """What the last verdict was found by, for `explain`."""

    def judge(self, sums: Tensor, counts: Tensor, norm: Tensor) -> Tensor:
        """Decide on a step and remember it.

        Args:
            sums: losses by source over the trained positions of the global batch: [sources].
            counts: these positions: [sources].
            norm: joint gradient norm before clipping, a scalar; negative where it is not finite.

        Returns:
            FINE, NOT_FINITE or SPIKE, an int64 device scalar, the same on all ranks.

        Collective: all ranks, on the device.
        """
        found = torch.cat([norm.double()[None], sums.double(), counts.double()])
        verdict = torch.where(torch.isfinite(found).all() & (norm >= 0), FINE, NOT_FINITE)
        if self._sigma is not None:
            usual = self._usual_losses()
            # [2, window]: norms, and how far the losses were above what their sources lead to expect
            earlier = torch.stack([self._window[0], self._excess(self._window[1:], usual)])
            now = torch.stack([found[0], self._excess(found[1:, None], usual)[0]])
            limits = earlier.mean(dim=1) + self._sigma * earlier.std(dim=1)
            is_spike = (now > limits).any() & (self._filled >= self._size)
            verdict = torch.where((verdict == FINE) & is_spike, SPIKE, verdict)
            self.judged = (found, usual, now, limits)
        # Ranks may differ in the last bit of a norm: what one rank refuses, all refuse.
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
        accepted = verdict == FINE
        at = torch.arange(self._size, device=found.device) == self._filled % self._size
        self._window = torch.where(at & accepted, found[:, None], self._window)
        self._filled = self._filled + accepted
        self.skipped = self.skipped + (torch.arange(3, device=verdict.device) == verdict)
        return verdict

    def explain(self, judged: tuple[Tensor, ...] | None = None) -> str:
        """Why a step was refused. Waits for the device.

        Args:
            judged: as it was after `judge`; None: of the last step.
        """
        judged = self.judged if judged is None else judged
        if not judged:
            return "its loss or its gradients are not finite"
        found, usual, now, limits = (values.tolist() for values in judged)
        number = len(self._sources)
        sums, counts = found[1 : 1 + number], found[1 + number :]
        losses = ", ".join(
            f"{name} {total / count:.4g} (usual: {mean:.4g})"
            for name, total, count, mean in zip(self._sources, sums, counts, usual, strict=True)
            if count
        )
        reasons = []
        if not (torch.isfinite(judged[0]).all() and found[0] >= 0):
            reasons.append("its loss or its gradients are not finite")
        else:
            if now[1] > limits[1]:
                reasons.append(
                    f"its loss is {now[1]:.4g} above the usual, where {limits[1]:.4g} is the limit"
                )
            if now[0] > limits[0]:
                reasons.append(f"its gradient norm is {now[0]:.4g}, where {limits[0]:.4g} is the limit")
        return f"{' and '.join(reasons)}; loss of {losses}"

    def go_back(self, state: GuardState | None) -> None:
        """Forget what is usual and what was accepted after a saved state; refused steps stay counted.

        Args:
            state: of the checkpoint that the run goes back to; None: it has none.
        """
        self._filled = torch.zeros_like(self._filled)
        self.skipped[FINE] = 0 if state is None else state.skipped[FINE]

    def state(self) -> GuardState:
        """For `state.json`. Waits for the device."""
        content = {
            "sources": self._sources,
            "window": self._window.tolist(),
            "filled": int(self._filled),
            "skipped": self.skipped.tolist(),
        }
        return GuardState.model_validate(content)

    def load(self, state: GuardState) -> None:
        """Go on from a saved state. A window of another length or of other sources starts empty."""
        self.skipped.copy_(torch.tensor(state.skipped))
        if state.sources == self._sources and len(state.window[0]) == self._size:
            self._window.copy_(torch.tensor(state.window, dtype=torch.float64))
            self._filled.fill_(state.filled)

    def _usual_losses(self) -> Tensor:
        """Mean loss by source over the window: [sources]. Not a number for one that was not there."""
        sums, counts = self._window[1:].unflatten(0, (2, -1)).sum(dim=-1)
        return sums / counts

    def _excess(self, totals: Tensor, usual: Tensor) -> Tensor:
        """How far mean losses are above the usual ones of the same mixture: [steps].

        Args:
            totals: sums of losses by source, then counts: [2 * sources, steps].
            usual: losses by source: [sources]. One without counts as it is found.
        """
        sums, counts = totals.unflatten(0, (2, -1))
        expected = torch.where(usual.isnan()[:, None], sums, counts * usual[:, None])
        return (sums - expected).sum(dim=0) / counts.sum(dim=0).clamp(min=1.0)

    @property
    def _size(self) -> int:
        return self._window.shape[1]
