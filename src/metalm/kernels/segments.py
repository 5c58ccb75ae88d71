"""Segments: the form of mask that variable-length flash attention takes, found where the mask is made.

Packed elements fall into runs that see nothing outside themselves: documents, seen causally, or spans, seen
whole. Their number and the longest one must be known to the host, which must not wait for the device: so
they are found in the collator, on the CPU, and carried beside the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of the elements of B rows of S, taken end to end.

    Args:
        bounds: int32 `[N + 1]`, where the runs begin, and B * S. Padding makes runs of its own.
        longest: elements of the longest run.
        is_causal: an element sees its run up to itself, else the whole run.
        has_padding: some run is padding, whose elements see nothing.
    """

    bounds: Tensor
    longest: int
    is_causal: bool
    has_padding: bool

    @classmethod
    def of_rows(
        cls, num_rows: int, length: int, *, is_causal: bool, device: torch.device | str | None = None
    ) -> Segments:
        """Each row is one run."""
        bounds = torch.arange(num_rows + 1, dtype=torch.int32, device=device) * length
        return cls(bounds, length, is_causal, False)

    def is_uniform(self, num_elements: int) -> bool:
        """Whether all runs of so many elements are of one length, and none is padding; known to the host."""
        return not self.has_padding and (len(self.bounds) - 1) * self.longest == num_elements

    def cut(self, x: Tensor) -> Tensor:
        """`[B, H, S, D]` as the runs `[N, longest, H, D]`, which all have one length."""
        return x.transpose(1, 2).reshape(-1, self.longest, x.shape[1], x.shape[3])

    def to(self, device: torch.device | str) -> Segments:
        """The same on another device."""
        return Segments(self.bounds.to(device), self.longest, self.is_causal, self.has_padding)

    def repeated(self, num_rows: int, length: int) -> Segments:
        """Those of `num_rows` rows that all have the runs of this one row of `length`."""
        offsets = torch.arange(num_rows, dtype=torch.int32, device=self.bounds.device) * length
        starts = (offsets[:, None] + self.bounds[:-1]).flatten()
        end = torch.full_like(self.bounds[:1], num_rows * length)
        return Segments(torch.cat([starts, end]), self.longest, self.is_causal, self.has_padding)


def find_segments(start: np.ndarray, end: np.ndarray) -> Segments | None:
    """The segments of a mask over its own queries, or None where it has another form.

    Args:
        start: integers `[B, S]`, the first visible key of each query.
        end: `[B, S]`, one past the last.
    """
    num_rows, length = start.shape
    if not start.size:
        return None
    offset = np.arange(num_rows, dtype=np.int64)[:, None] * length
    visible = (end > start).ravel()
    begin, last = (start + offset).ravel(), (end + offset).ravel()
    place = np.arange(num_rows * length)
    begin = np.where(visible, begin, -1)
    opens = np.ones(num_rows * length, bool)
    opens[1:] = (begin[1:] != begin[:-1]) | (place[1:] % length == 0)
    bounds = np.append(np.flatnonzero(opens), num_rows * length)
    run = np.cumsum(opens) - 1
    if (begin[visible] != bounds[run][visible]).any():
        return None
    is_causal = bool((last[visible] == place[visible] + 1).all())
    if not is_causal and (last[visible] != bounds[run + 1][visible]).any():
        return None
    return Segments(
        torch.from_numpy(bounds.astype(np.int32)),
        int(np.diff(bounds).max()),
        is_causal,
        not bool(visible.all()),
    )
