"""Which sample comes when: every epoch's chunks are permuted, dealt to the lanes, shuffled in a window.

A chunk is a run of consecutive samples of one shard. All epochs of a source form one endless sequence of
chunks (epoch 0 permuted, epoch 1 permuted otherwise, ...), and its n-th chunk goes to lane n mod L. So a
lane's k-th chunk is a pure function of (seed, source, lane, k): a place in the corpus is two integers,
every sample is dealt exactly once per epoch, and nothing special happens where a source has fewer chunks
than there are lanes: the lanes then start in different epochs.

Consecutive chunks of a lane form blocks of about `shuffle_window` samples, which are shuffled whole.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from metalm.data.index import ShardIndex
from metalm.data.streams import Stream

CHUNKS_PER_LANE = 4
"""Chunks of a small corpus are shortened until every lane gets this many per epoch, if it can."""


class SampleOrder:
    """The order of one source's samples in every lane, shared by all lanes of a process."""

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        source_name: str,
        num_lanes: int,
        chunk_samples: int,
        shuffle_window: int,
    ) -> None:
        self.num_lanes = num_lanes
        self.chunk_samples = max(1, min(chunk_samples, index.num_samples // (CHUNKS_PER_LANE * num_lanes)))
        self.block_chunks = max(1, shuffle_window // self.chunk_samples)
        self._starts, self._ends = _cut_chunks([s.num_samples for s in index.shards], self.chunk_samples)
        self.num_chunks = len(self._starts)
        self._epoch_stream = Stream(seed, f"chunks of {source_name}")
        self._seed, self._block_purpose = seed, f"blocks of {source_name}"
        self._lane_streams: dict[int, Stream] = {}
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._epochs_kept = 2 + self.block_chunks * num_lanes // self.num_chunks
        self.signature = (
            f"{index.num_samples} samples in chunks of {self.chunk_samples}, {self.block_chunks} chunks "
            f"shuffled together, {num_lanes} lanes, seed {seed}"
        )
        """Equal signatures mean equal orders; compared when a run resumes."""

    def block(self, lane: int, number: int) -> np.ndarray:
        """The samples [n] int64 of a lane's block, in the order in which they are read."""
        chunks = []
        for k in range(number * self.block_chunks, (number + 1) * self.block_chunks):
            epoch, position = divmod(k * self.num_lanes + lane, self.num_chunks)
            chunk = self._permutation(epoch)[position]
            chunks.append(np.arange(self._starts[chunk], self._ends[chunk]))
        samples = np.concatenate(chunks)
        return samples[self._lane_stream(lane).permutation(number, len(samples))]

    def epoch(self, lane: int, number: int) -> int:
        """The epoch of the first chunk of a lane's block."""
        return (number * self.block_chunks * self.num_lanes + lane) // self.num_chunks

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._epoch_stream.permutation(epoch, self.num_chunks)
            while len(self._epochs) > self._epochs_kept:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _lane_stream(self, lane: int) -> Stream:
        if lane not in self._lane_streams:
            self._lane_streams[lane] = Stream(self._seed, self._block_purpose, lane)
        return self._lane_streams[lane]


class SequentialOrder:
    """Every sample once, in the order of the index, for evaluation. One lane."""

    BLOCK = 256

    def __init__(self, index: ShardIndex) -> None:
        self._num_samples = index.num_samples

    def block(self, lane: int, number: int) -> np.ndarray:
        """The samples [n] int64 of the block; none after the last sample."""
        first = number * self.BLOCK
        return np.arange(first, max(first, min(first + self.BLOCK, self._num_samples)))


def _cut_chunks(samples_per_shard: list[int], chunk_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """First samples and ends [num_chunks] int64 of all chunks; a chunk never crosses shards."""
    counts = np.array(samples_per_shard, np.int64)
    shard_starts = np.cumsum(counts) - counts
    chunks_per_shard = -(-counts // chunk_samples)
    number_in_shard = np.arange(chunks_per_shard.sum()) - np.repeat(
        np.cumsum(chunks_per_shard) - chunks_per_shard, chunks_per_shard
    )
    starts = np.repeat(shard_starts, chunks_per_shard) + number_in_shard * chunk_samples
    ends = np.minimum(starts + chunk_samples, np.repeat(shard_starts + counts, chunks_per_shard))
    return starts, ends
