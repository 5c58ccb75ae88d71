"""Chat files to shards of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalm.data.documents.chats import TrainedAnswers, chat_example
from metalm.data.documents.example import Example
from metalm.data.preparation.chat_records import turns_of
from metalm.data.preparation.example_shards import SHARD_BYTES, ExampleTask, prepare_examples
from metalm.data.preparation.folder import CONTENTS, digest_of, named_folder
from metalm.data.preparation.media_files import open_media_files, tar_of
from metalm.data.preparation.record_tasks import record_tasks
from metalm.errors import BadSample, ConfigError, MetaLMError
from metalm.modalities import Convert
from metalm.progress import Phase


@dataclass(frozen=True)
class ChatForm:
    """How records become examples."""

    media_root: Path
    train: TrainedAnswers

    def examples(self, record: Any) -> list[Example | str]:
        """The example of a record, or the cause of its absence."""
        try:
            return [chat_example(turns_of(record, open_media_files(self.media_root)), self.train)]
        except BadSample as bad:
            return [bad.cause]
        except MetaLMError:
            raise
        except Exception:  # a record may hold anything anywhere
            return ["bad_record"]


def prepare_chats(
    inputs: Sequence[Path],
    out: Path,
    *,
    train: TrainedAnswers = "all",
    media_folder: Path | None = None,
    converts: Mapping[str, Convert],
    settings: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    first_number: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Writes shards of the examples of chat files, their index and a report: see `prepare_examples`.

    Args:
        inputs: `.jsonl` (also compressed), `.json` or `.parquet`; see `record_tasks` and `chat_records`.
        train: on all answers of a chat, or on the last one alone.
        media_folder: a folder or a tar that names of images and clips are looked for in; default: the folder
            of their file.
        settings: those of `converts`; with others, an interrupted call does not go on.
        first_number: of the first input, in names of shards, when inputs are prepared apart.

    Raises:
        ConfigError: options that contradict the folder, or a package that is not installed.
        DataError: an input cannot be read, or nothing was kept.
    """
    if not inputs:
        raise ConfigError("no input was given")
    tasks: list[ExampleTask] = []
    for number, path in enumerate(Phase.over("listing the inputs", inputs, "inputs"), start=first_number):
        root = path.parent if media_folder is None else media_folder
        open_media_files(root)  # what is not there shows here
        tasks += record_tasks(number, path, ChatForm(root, train))
    plan = {
        "inputs": [path.name for path in inputs],
        "sizes": [path.stat().st_size for path in inputs],
        CONTENTS: [digest_of(path) for path in (*inputs, *tar_of(media_folder))],
        "train": train,
        **named_folder(media_folder),
        **settings,
        "first_number": first_number,
    }
    return prepare_examples(
        tasks, out, plan=plan, converts=converts, shard_bytes=shard_bytes, processes=processes
    )
