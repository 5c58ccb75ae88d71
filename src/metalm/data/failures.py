"""What happens to a sample that cannot be used: skipped, counted by cause, shown; too many stop the run."""

from __future__ import annotations

import logging
from collections import Counter

from metalm.errors import DataError

logger = logging.getLogger(__name__)

SHOWN_PER_CAUSE = 3
"""Failures of one cause that are logged as warnings; later ones are counted."""


class FailureGuard:
    """Counts the bad samples of one stream of samples, and stops it at too many in a row."""

    def __init__(self, skipped: Counter[str], max_consecutive: int) -> None:
        self._skipped = skipped
        self._max_consecutive = max_consecutive
        self._consecutive = 0

    def passed(self) -> None:
        """To be called for each good sample."""
        self._consecutive = 0

    def failed(self, cause: str, shard: str, sample: int) -> None:
        """To be called for each bad sample.

        Raises:
            DataError: this was the last of too many in a row.
        """
        self._skipped[cause] += 1
        self._consecutive += 1
        level = logging.WARNING if self._skipped[cause] <= SHOWN_PER_CAUSE else logging.DEBUG
        logger.log(level, "skipped sample %d of shard %s: %s", sample, shard, cause)
        if self._consecutive >= self._max_consecutive:
            raise DataError(
                f"{self._consecutive} bad samples in a row, the last in shard {shard}: {cause} "
                "(limit: data.max_consecutive_failures)"
            )
