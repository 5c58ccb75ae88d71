"""Counter-based random streams: what is drawn depends on where it is drawn, not on what was drawn before.

A draw is addressed by (seed, purpose, lane, ordinal), so a lane resumes at any place without replaying
anything, and ranks and workers draw the same values. Only the raw words of Philox are used: they are
the same in every version of numpy, which its distributions are not.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


class Stream:
    """The random words of one purpose in one lane, addressed by ordinal."""

    def __init__(self, seed: int, purpose: str, lane: int = 0) -> None:
        purpose_word = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
        self._bits = np.random.Philox(0)
        self._counter = np.array([0, 0, lane, 0], np.uint64)
        self._state: Any = {
            "bit_generator": "Philox",
            "state": {
                "counter": self._counter,
                "key": np.array([seed % 2**64, purpose_word], np.uint64),
            },
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }

    def words(self, ordinal: int, count: int) -> np.ndarray:
        """The first `count` words [count] uint64 at `ordinal` (below 2^64)."""
        self._counter[1] = ordinal
        self._bits.state = self._state
        return self._bits.random_raw(count)

    def uniforms(self, ordinal: int, count: int) -> np.ndarray:
        """The first `count` values [count] float64 in [0, 1) at `ordinal`."""
        return (self.words(ordinal, count) >> np.uint64(11)) * 2.0**-53

    def permutation(self, ordinal: int, size: int) -> np.ndarray:
        """A permutation [size] int64 of 0..size-1."""
        return np.argsort(self.words(ordinal, size), kind="stable")
