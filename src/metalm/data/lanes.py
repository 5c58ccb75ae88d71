"""A lane: a deterministic, endless stream of packed rows, drawn from a mixture of sources.

What a lane yields depends on (seed, config, lane) and its state alone, not on which rank or worker runs
it. Its state is JSON: a few integers per source.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from metalm.config.schema import RunConfig
from metalm.data.augmented import ImageAugmenter
from metalm.data.corpus import Corpus
from metalm.data.documents.spans import SpanSampler
from metalm.data.order.sample_order import SampleOrder, ShardOrder
from metalm.data.order.streams import Stream
from metalm.data.packing.continuous import ContinuousPacker
from metalm.data.packing.whole import WholePacker
from metalm.data.row import Row
from metalm.data.sources import Source
from metalm.errors import ConfigError

logger = logging.getLogger(__name__)

LaneState = dict[str, Any]


def owned_lanes(num_lanes: int, dp_rank: int, dp_size: int) -> range:
    """The lanes of one data-parallel rank: those with lane * dp_size // num_lanes == dp_rank.

    Raises:
        ConfigError: the lanes do not divide by the data-parallel size.
    """
    if num_lanes % dp_size:
        raise ConfigError(
            f"data.lanes is {num_lanes}, which the data-parallel size {dp_size} does not divide"
        )
    lanes_per_rank = num_lanes // dp_size
    return range(dp_rank * lanes_per_rank, (dp_rank + 1) * lanes_per_rank)


class Mixture:
    """The sources of a run with their orders: what all lanes of a process share."""

    def __init__(self, corpus: Corpus, split: int = 1) -> None:
        """
        Args:
            corpus: of the run.
            split: how many lanes there are for each to which samples were dealt: see `lane_growth`.

        Raises:
            ConfigError, DataError: a source, or what reads it, cannot be used.
        """
        self.config, self.split = corpus.config, split
        self.sources = corpus.sources
        self.orders = {source.name: _order(corpus.config, source, split) for source in self.sources}
        self.makers = {source.name: corpus.document_maker(source) for source in self.sources}
        self.retokenizers = {
            source.name: corpus.retokenizer(source)
            for source in self.sources
            if self.makers[source.name] is None
        }

    def check_state(self, state: LaneState) -> None:
        """Raises ConfigError if a lane's state was saved under another order of the samples."""
        for name, saved in state["sources"].items():
            if name in self.orders and saved["order"] != self.orders[name].signature:
                raise ConfigError(
                    f"source {name} was saved as {saved['order']}, but is now {self.orders[name].signature}: "
                    "restore the settings, or give the source a new name to begin it anew"
                )

    def drop_removed_sources(self, state: LaneState) -> LaneState:
        """A lane's saved state without the sources that are no longer in the config."""
        return {**state, "sources": {k: v for k, v in state["sources"].items() if k in self.orders}}

    def log_changes(self, state: LaneState) -> None:
        """Logs how sources differ from those of when a lane's state was saved."""
        old = {name: saved["weight"] for name, saved in state["sources"].items()}
        new = {source.name: source.weight for source in self.sources}
        for name in old | new:
            if name not in old:
                logger.info("source %s is new, with weight %g: it starts at its first epoch", name, new[name])
            elif name not in new:
                logger.info("source %s was removed: its position is dropped", name)
            elif old[name] != new[name]:
                logger.info("source %s: weight %g is now %g", name, old[name], new[name])
        for source in self.sources:
            content = state["sources"].get(source.name, {}).get("content")  # none in older checkpoints
            if content not in (None, source.index.fingerprint):
                logger.warning(
                    "source %s: its shards hold other samples than when the run was saved; it goes on at the "
                    "same place of these. Give the source a new name to begin it anew",
                    source.name,
                )


class Lane:
    """One lane of a run. A lane made from the `state()` after row n continues with row n + 1."""

    def __init__(self, mixture: Mixture, lane: int, state: LaneState | None = None) -> None:
        self._mixture, self._lane = mixture, lane
        self._rows: int = state["rows"] if state else 0
        saved = state["sources"] if state else {}
        self._sources = [source.for_lane() for source in mixture.sources]
        self._packers = [
            self._make_packer(source, saved.get(source.name, {}).get("packer")) for source in self._sources
        ]
        self._choices = Stream(mixture.config.run.seed, "source of a row", lane)
        self._dropout = Stream(mixture.config.run.seed, "dropout of a row", lane)
        self._weights = np.array([source.weight for source in mixture.sources])

    def next_row(self) -> Row:
        """The next row of the lane.

        Raises:
            DataError: as `SampleStream.read_next`.
        """
        row = self._packers[self._choose()].next_row()
        assert row is not None
        seed = int(self._dropout.words(self._rows, 1)[0] >> np.uint64(1))
        self._rows += 1
        return dataclasses.replace(row, dropout_seed=seed)

    def state(self) -> LaneState:
        """Where the next row begins, and what has been counted, as JSON holds it."""
        sources = {
            source.name: {
                "weight": source.weight,
                "order": self._mixture.orders[source.name].signature,
                "content": source.index.fingerprint,
                "packer": packer.state(),
            }
            for source, packer in zip(self._mixture.sources, self._packers, strict=True)
        }
        config, split = self._mixture.config, self._mixture.split
        return {"rows": self._rows, "lanes": config.data.lanes, "split": split, "sources": sources}

    def close(self) -> None:
        """Closes shards."""
        for source in self._sources:
            source.reader.close()

    def _choose(self) -> int:
        if len(self._packers) == 1:
            return 0
        weights = self._weights
        if self._mixture.config.data.mixture_unit == "tokens":
            # A row more than was counted keeps the ratio finite, and even at the start.
            length = self._mixture.config.data.sequence_length
            counted = [packer.counters for packer in self._packers]
            weights = weights * [(count.rows + 1) / (count.tokens + length) for count in counted]
        bounds = np.cumsum(weights)
        draw = self._choices.uniforms(self._rows, 1)[0] * bounds[-1]
        return min(int(np.searchsorted(bounds, draw, side="right")), len(bounds) - 1)

    def _make_packer(self, source: Source, state: dict[str, Any] | None) -> ContinuousPacker | WholePacker:
        config, name = self._mixture.config, source.name
        order = self._mixture.orders[name]
        seed, length = config.run.seed, config.data.sequence_length
        failures = config.data.max_consecutive_failures
        maker = self._mixture.makers[name]
        if maker is not None:
            return WholePacker(
                source,
                order,
                self._lane,
                maker=maker,
                sequence_length=length,
                draws=Stream(seed, f"captions and prefixes of {name}", self._lane),
                max_consecutive_failures=failures,
                augmenter=self._augmenter(name),
                state=state,
            )
        return ContinuousPacker(
            source,
            order,
            self._lane,
            sequence_length=length,
            spans=SpanSampler(config.data.spans, Stream(seed, f"spans of {name}", self._lane)),
            max_consecutive_failures=failures,
            retokenizer=self._mixture.retokenizers[name],
            state=state,
        )

    def _augmenter(self, source: str) -> ImageAugmenter | None:
        config = self._mixture.config
        augmentation = config.data.sources[source].augmentation
        if augmentation is None:
            return None
        draws = Stream(config.run.seed, f"augmentation of {source}", self._lane)
        return ImageAugmenter(augmentation, config.model.encoders, draws)


def _order(config: RunConfig, source: Source, split: int) -> SampleOrder | ShardOrder:
    data, seed = config.data, config.run.seed
    num_lanes = data.lanes // split
    if source.url is not None:
        return ShardOrder(
            source.index,
            seed=seed,
            source_name=source.name,
            num_lanes=num_lanes,
            shuffle_window=data.shuffle_window,
            split=split,
        )
    return SampleOrder(
        source.index,
        seed=seed,
        source_name=source.name,
        num_lanes=num_lanes,
        chunk_samples=data.chunk_samples,
        shuffle_window=data.shuffle_window,
        split=split,
    )


def saved_state(states: dict[int, LaneState], lane: int) -> LaneState:
    """The state of one lane.

    Raises:
        ConfigError: the states do not hold this lane.
    """
    if lane not in states:
        raise ConfigError(
            f"the saved data state holds {len(states)} lanes, but not lane {lane}: it is not whole"
        )
    return states[lane]
