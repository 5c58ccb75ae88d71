"""The end of a start: recorded in the run's folder, and told in a last line that says what comes next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from metalm.checkpoint.names import CHECKPOINTS_NAME, list_checkpoints, step_of
from metalm.errors import EXIT_DONE, EXIT_FAULT, EXIT_RESTART, MetaLMError
from metalm.run_ends import record_end
from metalm.training.session import Session


class Ending:
    """How the start of a run ends, on the first rank; on others it does nothing.

    Attributes:
        step: steps done so far.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.step = 0

    def done(self) -> int:
        """The run has come to its last step."""
        folder = self._session.run_folder
        self._end(
            EXIT_DONE,
            "done",
            f"done: {self.step} steps; checkpoint {self._newest()}\n"
            f"to export it: metalm convert {folder} OUT",
        )
        return EXIT_DONE

    def stopped(self, reason: str | None, *, skipped: int) -> int:
        """The run was asked to stop, and has saved what it can go on from.

        Args:
            reason: who asked this rank, if it was asked.
            skipped: how many steps up to the last were refused: with any, nothing was saved.

        Collective: all ranks.
        """
        reasons: list[Any] = [None] * self._session.topology.world_size
        dist.all_gather_object(reasons, reason)
        who = next(filter(None, reasons), "a stop file that is gone")
        line = f"stopped as asked after step {self.step}, by {who}; {self._next_start(skipped)}"
        if self._session.launch.launcher == "torchrun" and "METALM_CODES" not in os.environ:
            line += f"\n(torchrun shows this as a failure with exit code {EXIT_RESTART}: it is none)"
        self._end(EXIT_RESTART, f"stopped by {who}", line)
        return EXIT_RESTART

    def failed(self, code: int, error: BaseException) -> None:
        """The run ends by an error."""
        newest = self._newest()
        known = isinstance(error, MetaLMError)
        cause = str(error) if known else f"{type(error).__name__}: {error}"
        once = " once that is mended" if known and code != EXIT_FAULT else ""
        after = (
            f"started again{once}, the run goes on from {newest}" if newest else "there is no checkpoint yet"
        )
        self._end(code, cause, f"ended by an error after step {self.step}; {after}")

    def _next_start(self, skipped: int) -> str:
        if not skipped:
            return "the same command goes on from there"
        newest = self._newest()
        does = f"goes on from {newest}" if newest else "begins anew, as there is no checkpoint yet"
        return f"the last {skipped} step(s) were skipped, so that nothing was saved: the same command {does}"

    def _newest(self) -> Path | None:
        """Of the steps done, once the run has taken up its place: a later one was passed over."""
        folders = list_checkpoints(self._session.run_folder / CHECKPOINTS_NAME)
        return next((one for one in reversed(folders) if not self.step or step_of(one) <= self.step), None)

    def _end(self, code: int, cause: str, line: str) -> None:
        if not self._session.is_first:
            return
        with suppress(OSError):  # a full disk: the line below tells it still
            record_end(self._session.run_folder, self.step, code, cause)
        with suppress(OSError):  # its terminal was closed
            print(line, flush=True)


@contextmanager
def told_end(session: Session) -> Iterator[Ending]:
    """Within it, an error that ends the run is recorded and told; other ends are told by the run itself."""
    ending = Ending(session)
    try:
        yield ending
    except MetaLMError as error:
        ending.failed(error.exit_code, error)
        raise
    except Exception as error:
        ending.failed(EXIT_FAULT, error)
        raise
