"""Which sample comes when: every epoch's chunks are permuted, dealt to the lanes, shuffled in a window.

A chunk is a run of consecutive samples of one shard. All epochs of a source form one endless sequence of
chunks (epoch 0 permuted, epoch 1 permuted otherwise, ...), and its n-th chunk goes to lane n mod L. So a
lane's k-th chunk is a pure function of (seed, source, lane, k): a place in the corpus is two integers,
every sample is dealt exactly once per epoch, and nothing special happens where a source has fewer chunks
than there are lanes: the lanes then start in different epochs.

Consecutive chunks of a lane form blocks of about `shuffle_window` samples, which are shuffled whole. A window
of more than 2^20 samples is no larger than the source: blocks are held in memory.

A run may go on with more lanes than its samples were dealt to. What each lane had before it is then shared by
several, `split` of them, in turns of a block (or a shard): lane l goes on where it stood and takes every
split-th turn from there, the new lanes l + L, l + 2 L, ... begin with the turns between. So what remained is
read once, whoever reads it, and the epochs stay as they were dealt.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from metalm.data.order.streams import Stream
from metalm.data.storage.index import ShardIndex

CHUNKS_PER_LANE = 4
"""Chunks of a small corpus are shortened until every lane gets this many per epoch, if it can."""

ANY_WINDOW = 1 << 20
"""Samples in a window that may be above those of the source: such a block goes through several epochs."""


class _Deal:
    """Chunks of all epochs, permuted epoch by epoch, dealt to the lanes in turn."""

    def __init__(self, seed: int, source_name: str, *, num_chunks: int, num_lanes: int, ahead: int) -> None:
        """`ahead` chunks of a lane are asked for together."""
        self._stream = Stream(seed, f"chunks of {source_name}")
        self._num_chunks, self._num_lanes = num_chunks, num_lanes
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()
        self._kept = 2 + ahead * num_lanes // num_chunks

    def chunk(self, lane: int, number: int) -> int:
        """A lane's chunk of that number."""
        epoch, position = divmod(number * self._num_lanes + lane, self._num_chunks)
        if epoch not in self._permutations:
            self._permutations[epoch] = self._stream.permutation(epoch, self._num_chunks)
            while len(self._permutations) > self._kept:
                self._permutations.popitem(last=False)
        return int(self._permutations[epoch][position])

    def epoch(self, lane: int, number: int) -> int:
        """The epoch of a lane's chunk."""
        return (number * self._num_lanes + lane) // self._num_chunks


class _Shuffle:
    """Permutations of the blocks of each lane."""

    def __init__(self, seed: int, source_name: str) -> None:
        self._seed, self._purpose = seed, f"blocks of {source_name}"
        self._streams: dict[int, Stream] = {}

    def __call__(self, samples: np.ndarray, lane: int, block: int) -> np.ndarray:
        """The samples of a block, shuffled."""
        if lane not in self._streams:
            self._streams[lane] = Stream(self._seed, self._purpose, lane)
        return samples[self._streams[lane].permutation(block, len(samples))]


class _Turns:
    """Which blocks a lane takes of those that were dealt to the lane it was split from."""

    def __init__(self, num_lanes: int, split: int, blocks_per_turn: int) -> None:
        """`num_lanes` to which samples were dealt; `split` lanes for each of them now."""
        self.num_lanes, self.split, self.blocks_per_turn = num_lanes, split, blocks_per_turn

    def first_block(self, lane: int) -> int:
        """Where a lane without a state begins."""
        return lane // self.num_lanes * self.blocks_per_turn

    def following(self, block: int) -> int:
        """The lane's block after this one."""
        following = block + 1
        ends_turn = following % self.blocks_per_turn == 0
        return following + (self.split - 1) * self.blocks_per_turn if ends_turn else following

    def later_turn(self, block: int, turns: int) -> int:
        """The first block of the turn so many after the block's."""
        return (block // self.blocks_per_turn + turns) * self.blocks_per_turn


class SampleOrder(_Turns):
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
        split: int = 1,
    ) -> None:
        super().__init__(num_lanes, split, blocks_per_turn=1)
        self.chunk_samples = max(1, min(chunk_samples, index.num_samples // (CHUNKS_PER_LANE * num_lanes)))
        window = min(shuffle_window, max(index.num_samples, ANY_WINDOW))
        self.block_chunks = max(1, window // self.chunk_samples)
        self._starts, self._ends = _cut_chunks([s.num_samples for s in index.shards], self.chunk_samples)
        self.num_chunks = len(self._starts)
        ahead = self.block_chunks * split
        self._deal = _Deal(seed, source_name, num_chunks=self.num_chunks, num_lanes=num_lanes, ahead=ahead)
        self._shuffle = _Shuffle(seed, source_name)
        self.signature = (
            f"{index.num_samples} samples in chunks of {self.chunk_samples}, {self.block_chunks} chunks "
            f"shuffled together, {num_lanes} lanes, seed {seed}"
        )
        """Equal signatures mean equal orders; compared when a run resumes."""

    def block(self, lane: int, number: int) -> np.ndarray:
        """The samples [n] int64 of a lane's block, in the order in which they are read."""
        lane %= self.num_lanes
        chunks = []
        for k in range(number * self.block_chunks, (number + 1) * self.block_chunks):
            chunk = self._deal.chunk(lane, k)
            chunks.append(np.arange(self._starts[chunk], self._ends[chunk]))
        return self._shuffle(np.concatenate(chunks), lane, number)

    def epoch(self, lane: int, number: int) -> int:
        """The epoch of the first chunk of a lane's block."""
        return self._deal.epoch(lane % self.num_lanes, number * self.block_chunks)


class ShardOrder(_Turns):
    """The order of a source whose shards can only be read from the front: a chunk is a whole shard.

    A lane reads its shards one after another, each in windows of `shuffle_window` consecutive samples; a
    window is a block, and is shuffled. Shards have as many blocks as the largest has windows, so that
    the place of a block is plain arithmetic: the last blocks of the others are empty.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        source_name: str,
        num_lanes: int,
        shuffle_window: int,
        split: int = 1,
    ) -> None:
        counts = np.array([shard.num_samples for shard in index.shards], np.int64)
        starts = np.cumsum(counts) - counts
        self._starts, self._counts = starts[counts > 0], counts[counts > 0]
        self._window = shuffle_window
        super().__init__(num_lanes, split, blocks_per_turn=-(-int(counts.max()) // shuffle_window))
        num_chunks = len(self._starts)
        self._deal = _Deal(seed, source_name, num_chunks=num_chunks, num_lanes=num_lanes, ahead=split)
        self._shuffle = _Shuffle(seed, source_name)
        self.signature = (
            f"{index.num_samples} samples in {len(self._starts)} whole shards, windows of {shuffle_window}, "
            f"{num_lanes} lanes, seed {seed}"
        )
        """Equal signatures mean equal orders; compared when a run resumes."""

    def block(self, lane: int, number: int) -> np.ndarray:
        """The samples [n] int64 of a lane's block, in the order in which they are used; n may be 0."""
        lane %= self.num_lanes
        turn, window = divmod(number, self.blocks_per_turn)
        shard = self._deal.chunk(lane, turn)
        start, count = self._starts[shard], self._counts[shard]
        first = window * self._window
        samples = start + np.arange(first, max(first, min(first + self._window, count)))
        return self._shuffle(samples, lane, number)

    def epoch(self, lane: int, number: int) -> int:
        """The epoch of a lane's block."""
        return self._deal.epoch(lane % self.num_lanes, number // self.blocks_per_turn)


class SequentialOrder:
    """Every sample once, in the order of the index, for evaluation. One lane."""

    BLOCK = 256

    def __init__(self, index: ShardIndex) -> None:
        self._num_samples = index.num_samples

    def block(self, lane: int, number: int) -> np.ndarray | None:
        """The samples [n] int64 of the block; None after the last sample."""
        first = number * self.BLOCK
        if first >= self._num_samples:
            return None
        return np.arange(first, min(first + self.BLOCK, self._num_samples))

    def first_block(self, lane: int) -> int:
        """The first of the index."""
        return 0

    def following(self, block: int) -> int:
        """The block after this one."""
        return block + 1


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
