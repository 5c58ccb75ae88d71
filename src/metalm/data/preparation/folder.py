"""The folder that a preparation writes, and its memory across restarts.

Work is cut into units (a stretch of a text file, some thousand images) that depend on the input and the
options alone. A unit that is done leaves a receipt: its shards and its counts. After a kill the same
command goes on with the units that have no receipt, and writes the same bytes as if nothing had happened.

    OUT/*.tar, index.json     the shards; the index appears last, so training never meets a torso
    OUT/report.json           what was kept and dropped
    OUT/dropped.jsonl         where the first dropped samples of each cause were
    OUT/preparation/          plan.json and receipts/
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metalm.data.preparation.shard_writer import PARTIAL_SUFFIX, WrittenShard
from metalm.data.preparation.tally import Tally, format_table
from metalm.data.storage.index import INDEX_NAME, build_index
from metalm.data.storage.index_document import read_document
from metalm.errors import ConfigError, DataError
from metalm.file_lock import try_lock

DROPPED_NAME = "dropped.jsonl"
MAX_SHOWN_PER_CAUSE = 1000
"""Dropped samples of one cause in `DROPPED_NAME`; report.json counts all."""
BYTES_PER_INDEX_PROCESS = 1 << 30
"""Scanning fewer takes less time than starting another process."""
MAX_SHOWN_CHANGES = 5
MAX_SHOWN_CHARACTERS = 100
"""Of a value that changed, in the message that says so."""
CONTENTS = "contents"
"""Of a plan: digests of what its inputs hold. Plans of earlier versions lack them."""
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparationFolder:
    """Receipts and shards of one preparation. Only a path: worker processes hold copies."""

    path: Path

    @contextmanager
    def claim(self, plan: Mapping[str, Any]) -> Iterator[None]:
        """Starts or continues the preparation that `plan` describes; keeps other programs out meanwhile.

        Raises:
            ConfigError: the folder holds shards of another plan or of unknown origin, or is in use.
        """
        has_shards, is_ours = any(self.path.glob("*.tar")), self._plan_file.exists()
        if has_shards and not is_ours:
            raise ConfigError(
                f"{self.path} holds shards that no preparation of this program wrote: name a new folder"
            )
        try:
            self._receipts.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "preparation" / "lock").open("w")
        except OSError as error:
            raise ConfigError(f"cannot write into {self.path}: {error.strerror}") from error
        with lock:
            if try_lock(lock) is False:
                raise ConfigError(f"another preparation is writing {self.path}: wait, or stop it")
            if has_shards:
                recorded = json.loads(self._plan_file.read_bytes())
                if CONTENTS in plan and CONTENTS not in recorded:
                    logger.warning(
                        "%s was begun by an earlier version, which recorded no digests of its inputs: they "
                        "are taken to be what they were",
                        self.path,
                    )
                    recorded[CONTENTS] = plan[CONTENTS]
                require_equal_plans(self.path, recorded, plan)
            else:
                for receipt in self._receipts.glob("*.json"):
                    receipt.unlink()
            _replace(self._plan_file, json.dumps(plan, indent=1))
            for partial in self.path.glob(f".*{PARTIAL_SUFFIX}") if is_ours else ():
                partial.unlink()
            yield

    def is_done(self, unit: str) -> bool:
        """Whether the unit has a receipt and its shards are there in full."""
        try:
            receipt = json.loads((self._receipts / f"{unit}.json").read_bytes())
        except FileNotFoundError:
            return False
        return all(self._is_whole(shard) for shard in receipt["shards"])

    def record(self, unit: str, shards: Sequence[WrittenShard], tally: Tally) -> None:
        """Writes the receipt of a unit whose shards are on disk."""
        receipt = {
            "shards": [asdict(shard) for shard in shards],
            "tally": tally.as_json(),
            "places": tally.places,
            "num_lines": tally.num_lines,
        }
        _replace(self._receipts / f"{unit}.json", json.dumps(receipt, indent=1))

    def finish(self, *, kind: str, tokenizer_fingerprint: str | None, processes: int) -> dict[str, Any]:
        """Adds up the receipts of all units, writes the index if there is none, and the report.

        Says so if an earlier call had come to this end.

        Raises:
            DataError: not one sample was kept, or the folder holds a shard that is not ours.
        """
        if self.is_finished():
            logger.info("%s was prepared before: nothing was left to do", self.path)
        tally, shards, dropped = Tally(), set(), _DroppedSamples()
        for file in sorted(self._receipts.glob("*.json"), key=_unit_numbers):
            receipt = json.loads(file.read_bytes())
            tally.add(receipt["tally"])
            dropped.add(_unit_numbers(file)[0], receipt)
            shards |= {shard["name"] for shard in receipt["shards"]}
        report = {"num_shards": len(shards), **tally.as_json()}
        if not shards:
            raise DataError(f"nothing was kept for {self.path}; dropped: {report['dropped'] or 'nothing'}")
        if strange := {file.name for file in self.path.glob("*.tar")} - shards:
            raise DataError(
                f"{self.path} also holds {', '.join(sorted(strange))}, of unknown origin: move it"
            )
        if not self._has_index():
            size = sum((self.path / name).stat().st_size for name in shards)
            build_index(
                self.path,
                kind=kind,
                tokenizer_fingerprint=tokenizer_fingerprint,
                processes=min(processes, 1 + size // BYTES_PER_INDEX_PROCESS),
            )
        _replace(self.path / DROPPED_NAME, dropped.lines())
        _replace(self.path / "report.json", json.dumps(report, indent=1))
        return report

    def is_finished(self) -> bool:
        """Whether an earlier call came to its end and all shards are still there."""
        finished = (self.path / "report.json").exists() and self._has_index()
        return finished and all(self.is_done(file.stem) for file in self._receipts.glob("*.json"))

    def drop_index(self) -> None:
        """Removes the index, before shards change."""
        (self.path / INDEX_NAME).unlink(missing_ok=True)

    @property
    def _plan_file(self) -> Path:
        return self.path / "preparation" / "plan.json"

    @property
    def _receipts(self) -> Path:
        return self.path / "preparation" / "receipts"

    def _has_index(self) -> bool:
        """Whether there is one that this program reads: another version wrote another."""
        try:
            read_document(self.path / INDEX_NAME)
        except DataError:
            return False
        return True

    def _is_whole(self, shard: Mapping[str, Any]) -> bool:
        file = self.path / shard["name"]
        return file.is_file() and file.stat().st_size == shard["size"]


def named_folder(media_folder: Path | None) -> dict[str, str]:
    """What a plan holds of the folder of its images and clips, where one is named."""
    return {} if media_folder is None else {"media_folder": str(media_folder.absolute())}


def digest_of(path: Path) -> str:
    """The name of a file and a digest of its content, for a plan.

    Of a file above a mebibyte the digest is of its size and of parts from end to end: raw data can be
    terabytes. It is the same wherever, and however often, the same content is written.

    Raises:
        OSError: there is no such file.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(_SAMPLES):
                file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{path.name}: {digest.hexdigest()}"


def require_equal_plans(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to go on with a preparation that was begun otherwise.

    Args:
        folder: what both prepare.
        old: the plan on record.
        new: that of this call.

    Raises:
        ConfigError: they differ.
    """
    if changes := list(_changes(old, json.loads(json.dumps(new)))):
        details = "; ".join(changes[:MAX_SHOWN_CHANGES])
        if len(changes) > MAX_SHOWN_CHANGES:
            details += f"; and {len(changes) - MAX_SHOWN_CHANGES} more"
        raise ConfigError(
            f"{folder} was begun from other input or options ({details}): repeat the first command to go "
            "on, or name a new folder"
        )


def _changes(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """What differs between two values of JSON, each with the keys and positions that lead there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    elif isinstance(old, list) and isinstance(new, list):
        for number, (before, now) in enumerate(itertools.zip_longest(old, new)):
            yield from _changes(before, now, f"{place}[{number}]")
    elif old != new:
        before, now = repr(old), repr(new)
        both = zip(before, now, strict=False)
        start = next((number for number, (one, other) in enumerate(both) if one != other), len(before))
        yield f"{place} was {_shortened(before, start)}, is {_shortened(now, start)}"


def _shortened(text: str, start: int) -> str:
    """A text around the place where it begins to differ from another."""
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    first = max(0, min(start - MAX_SHOWN_CHARACTERS // 4, len(text) - MAX_SHOWN_CHARACTERS))
    shown = text[first : first + MAX_SHOWN_CHARACTERS]
    return f"{'...' if first else ''}{shown}{'...' if first + len(shown) < len(text) else ''}"


class _DroppedSamples:
    """Places of dropped samples over all units, with lines counted from the beginning of their files."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._shown: Counter[str] = Counter()
        self._before: Counter[int] = Counter()

    def add(self, input_number: int, receipt: Mapping[str, Any]) -> None:
        """A unit's; those of an input come in the order of its lines. Receipts of before have none."""
        for cause, places in receipt.get("places", {}).items():
            for place in places[: MAX_SHOWN_PER_CAUSE - self._shown[cause]]:
                if "line" in place:
                    place["line"] += self._before[input_number]
                self._lines.append(json.dumps({"cause": cause, **place}))
                self._shown[cause] += 1
        self._before[input_number] += receipt.get("num_lines", 0)

    def lines(self) -> str:
        """The content of the file."""
        return "\n".join(self._lines)


def _unit_numbers(receipt: Path) -> tuple[int, ...]:
    """Number of the input, and of the unit in it."""
    return tuple(map(int, receipt.stem.split("-")))


def _replace(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(content + "\n" if content else "")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def describe_shards(report: Mapping[str, Any], columns: tuple[str, ...], out: Path, seconds: float) -> str:
    """What a preparation says at its end: the table, where the shards are, and where what was dropped was."""
    lines = [format_table(report, columns)]
    if report["dropped"]:
        lines.append(f"where the dropped were: {out / DROPPED_NAME}")
    return "\n".join([*lines, f"{report['num_shards']} shards in {out}, {seconds:.1f} s"])
