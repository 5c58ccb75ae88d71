"""One run folder, one run: a lock that dies with its holder.

Two things guard the folder. The *lock* is `flock` on the file `lock` in it, which the system drops when
the process dies: at once on a local disk and between processes of one node. NFS (`flock` is a lock on the
server there) and Lustre (mounted with `flock`, the default of newer releases) keep it for the whole
cluster, and drop that of a node that is lost when they give up the node: after about 90 s on NFS 4, on
NFS 3 when the node has booted again, on Lustre when the node is evicted. The *heartbeat* is the file's
time of change, touched every 10 s. It tells whether a holder on another node lives where locks hold
within a node alone (NFS with `nolock` or `local_lock`, Lustre with `localflock`) or not at all; and it is
compared with itself alone, so that no two clocks need agree.

The file says who holds it: host, process and, under Slurm, job and restart. A job that was queued again
comes after its own earlier start, which Slurm has ended: it takes the folder at once, by a new file in
place of the old one. Whoever held that sees so at its next heartbeat (`is_lost`) and ends. A folder that
was left in order has no such file. Where it is gone while its holder lives, because it was removed or the
folder has another name now, nobody has taken the run: it goes on, and makes the file again where it can.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from metalm.errors import BusyError, ConfigError
from metalm.file_lock import try_lock
from metalm.regular_files import open_regular
from metalm.run_folder import LOCK_NAME

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
SILENCE_S = 35.0
"""A holder on another node that has not touched the file for so long is dead."""
_PROBE_S = 0.5
"""`find_holder` has the lock for less."""
_MOST_BYTES = 1 << 16
_SINCE = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True)
class Holder:
    """Who holds a run's folder."""

    host: str
    pid: int
    boot: str
    """Names the running system: two processes of one boot share its locks."""
    job: str | None
    chain: str | None
    """The first job of this one and its predecessors; each begins when the one before has ended."""
    restart: str | None
    since: str

    def __str__(self) -> str:
        job = "" if self.job is None else f", Slurm job {self.job}"
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @property
    def began(self) -> float:
        """`since`, in seconds since the epoch; 0 where it cannot be read."""
        try:
            return time.mktime(time.strptime(self.since, _SINCE))
        except (TypeError, ValueError, OverflowError):
            return 0.0

    def comes_after(self, other: Holder) -> bool:
        """Whether this is a later start of the same chain of jobs."""
        same_start = (self.job, self.restart) == (other.job, other.restart)
        return self.chain is not None and self.chain == other.chain and not same_start


def find_holder(run_folder: Path) -> Holder | None:
    """Who holds a run's folder, if this process could not take it; None as well where locks tell nothing."""
    path = run_folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # nobody, or not for this user to see
        return None
    try:
        if _lock(descriptor, path) is not False:
            return None
        holder = _parse(os.pread(descriptor, _MOST_BYTES, 0))
        return None if holder is None or _this_process().comes_after(holder) else holder
    finally:
        os.close(descriptor)


def last_holder(run_folder: Path, now: float) -> tuple[Holder, bool] | None:
    """Who the lock file of a run names, and whether that process lives; None where there is no such file.

    Like a start, it goes by the lock, and for a holder of another system by the heartbeat. It only reads.

    Args:
        now: the time, which is compared with the heartbeat: of a server with another clock, it misjudges.
    """
    try:
        file = open_regular(run_folder / LOCK_NAME)
    except OSError:
        return None
    with file:
        descriptor = file.fileno()
        holder = _parse(os.pread(descriptor, _MOST_BYTES, 0))
        if holder is None:
            return None
        is_silent = now - os.fstat(descriptor).st_mtime > SILENCE_S
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return holder, True
            return holder, not is_silent  # there are no locks here, or none for those who only read
        return holder, holder.boot != _this_boot() and not is_silent


class RunLock:
    """A run's folder, held by this process until `release`."""

    def __init__(self, run_folder: Path, *, silence_s: float = SILENCE_S) -> None:
        """Take the folder; it is made if it is not there.

        Args:
            run_folder: of the run.
            silence_s: see `SILENCE_S`.

        Raises:
            ConfigError: another process holds it, or it cannot be written.
            BusyError: a process of a node that gives no sign of life holds it: start again later.
        """
        self._path, self._silence_s = run_folder / LOCK_NAME, silence_s
        self._made = [folder for folder in (run_folder, *run_folder.parents) if not folder.exists()]
        self._own = _this_process()
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            self._descriptor, self._before = self._take()
            _write(self._descriptor, json.dumps(asdict(self._own)).encode())
        except OSError as error:
            raise ConfigError(f"cannot write to the run folder {run_folder}: {error}") from None
        self._is_accepted = self._is_lost = self._is_gone = False
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def accept(self) -> None:
        """Say that the run begins: from now on `release` leaves the folder in place."""
        self._is_accepted = True

    def is_lost(self) -> bool:
        """Whether a later start of the same job has taken the folder: this one must end."""
        return self._is_lost

    def release(self) -> None:
        """Let go of the folder. If nothing was accepted, the folder is as it was before."""
        self._released.set()
        with suppress(OSError):
            if _is_at(self._path, self._descriptor):
                if self._before and not self._is_accepted:
                    _write(self._descriptor, self._before)
                else:
                    self._path.unlink()
        os.close(self._descriptor)
        if not self._is_accepted:
            for folder in self._made:
                with suppress(OSError):  # somebody else's files are in it
                    folder.rmdir()

    def _take(self) -> tuple[int, bytes]:
        """The descriptor of the locked file, and what a dead holder has left in it."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            is_locked = _lock(descriptor, self._path, patience_s=_PROBE_S)
            if not _is_at(self._path, descriptor):  # removed or replaced since it was opened
                os.close(descriptor)
                continue
            content = os.pread(descriptor, _MOST_BYTES, 0)
            holder = _parse(content)
            if is_locked is not False and (holder is None or self._is_dead(holder, bool(is_locked))):
                return descriptor, content
            os.close(descriptor)
            if holder is not None and self._own.comes_after(holder):
                return self._replace(), content
            self._refuse(holder)

    def _is_dead(self, holder: Holder, is_locked: bool) -> bool:
        """Whether the holder that a file names is dead, now that its lock could be taken or there is none."""
        if holder.boot == self._own.boot and is_locked:
            return True
        return not self._own.comes_after(holder) and not self._beats(holder)

    def _refuse(self, holder: Holder | None) -> NoReturn:
        folder = self._path.parent
        advice = f"wait for its end, ask it to stop (metalm stop {folder}), or choose another run.name"
        if holder is None:
            raise ConfigError(f"the run {folder} is just being started by another process: {advice}")
        if holder.boot == self._own.boot or self._beats(holder):
            raise ConfigError(f"the run {folder} is held by {holder}: {advice}")
        raise BusyError(
            f"the run {folder} is held by {holder}, which gives no sign of life; the file system frees it "
            "when it gives that node up: start again in a minute or two"
        )

    def _beats(self, holder: Holder) -> bool:
        """Whether the holder touches the file, or has let go of it, while this process watches."""
        logger.warning("waiting up to %.0f s for a sign of life of %s", self._silence_s, holder)
        first, deadline = self._changed_at(), time.monotonic() + self._silence_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._silence_s / 10))
            if self._changed_at() != first:
                return True
        return False

    def _changed_at(self) -> tuple[int, int] | None:
        """Which file it is, and its time of change; opened anew, for NFS answers from memory otherwise."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(descriptor)
            return found.st_ino, found.st_mtime_ns
        finally:
            os.close(descriptor)

    def _replace(self) -> int:
        """Put a new file, locked by this process, in the place of one that a lost node still holds."""
        fresh, descriptor = self._fresh_file()
        fresh.replace(self._path)
        return descriptor

    def _fresh_file(self) -> tuple[Path, int]:
        """A file beside the lock, locked by this process, and its descriptor."""
        fresh = self._path.with_name(f"{LOCK_NAME}.{self._own.host}.{self._own.pid}")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        _lock(descriptor, fresh)
        _write(descriptor, json.dumps(asdict(self._own)).encode())
        return fresh, descriptor

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with suppress(OSError):  # a server that does not answer for a while
                found = _is_at(self._path, self._descriptor)
                self._is_lost = found is False
                if found is None:
                    self._make_again()
                os.utime(self._descriptor)

    def _make_again(self) -> None:
        """Put the file back, if the folder is there and nobody else has made it.

        The old one stays locked: what this process has open lies in the folder that it is in.

        Raises:
            OSError: it cannot be.
        """
        if not self._is_gone:
            logger.warning("%s is gone: was the run's folder moved? The run goes on", self._path)
            self._is_gone = True
        fresh, descriptor = self._fresh_file()
        try:
            os.link(fresh, self._path)
        except OSError:
            os.close(descriptor)
            raise
        finally:
            fresh.unlink()
        self._descriptor, self._is_gone = descriptor, False


def _this_process() -> Holder:
    job = os.environ.get("SLURM_JOB_ID")
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=_this_boot(),
        job=job,
        chain=os.environ.get("METALM_CHAIN", job),
        restart=os.environ.get("SLURM_RESTART_COUNT"),
        since=time.strftime(_SINCE),
    )


def _this_boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _parse(content: bytes) -> Holder | None:
    """The holder that a file names; None where it is empty or not (yet) whole."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None


def _lock(descriptor: int, path: Path, patience_s: float = 0.0) -> bool | None:
    """Whether the lock could be taken; None where the file system knows no locks."""
    deadline = time.monotonic() + patience_s
    while (is_locked := try_lock(descriptor)) is False and time.monotonic() < deadline:
        time.sleep(_PROBE_S / 10)
    if is_locked is None:
        logger.warning("%s: no locks here; its heartbeat alone guards the folder", path)
    return is_locked


def _is_at(path: Path, descriptor: int) -> bool | None:
    """Whether the open file is at this place; None where nothing is."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    own = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _write(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    os.fsync(descriptor)
