"""The loaders that tools/bench_data.py compares with, each on its own copy of the same documents and images.

A peer yields documents (token ids) and images (pixels, 224 a side) in its own shuffled order, and goes on
from inside an epoch as its documentation says. Its rows are made by one packer for all peers.
"""

from __future__ import annotations

import importlib.util
import io
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import webdataset
from PIL import Image
from torch.utils.data import IterableDataset

SHARDS = 8
IMAGE_SIZE = 224


class Peer(Protocol):
    """One loader. `write` is called once; the others after it, in the same or in another process."""

    name: str

    def write(self, folder: Path, documents: list[np.ndarray], images: list[bytes]) -> None:
        """Writes the corpus in the peer's own format."""

    def documents(self, folder: Path) -> Iterator[np.ndarray]:
        """All documents once."""

    def images(self, folder: Path) -> Iterator[np.ndarray] | None:
        """All images once, decoded and resized; None if it is not measured."""

    def restore(self, folder: Path, fraction: float) -> float | None:
        """Seconds from making the loader to its first document, that far into an epoch."""

    def dataset(self, folder: Path) -> IterableDataset | None:
        """For the memory of a DataLoader worker; None if it is not measured."""


def installed_peers() -> tuple[list[Peer], list[str]]:
    """The peers that can be imported, and the names of those that cannot."""
    found: list[Peer] = []
    missing = []
    for module, peer in (
        ("webdataset", WebDataset()),
        ("streaming", Streaming()),
        ("megatron.energon", Energon()),
        ("litdata", LitData()),
    ):
        try:
            present = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            present = False
        if present:
            found.append(peer)
        else:
            missing.append(peer.name)
    return found, missing


def pack(documents: Iterator[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Documents end to end, cut into rows; nothing else."""
    row, filled = np.empty(length, np.int64), 0
    for document in documents:
        first = 0
        while first < len(document):
            count = min(len(document) - first, length - filled)
            row[filled : filled + count] = document[first : first + count]
            first, filled = first + count, filled + count
            if filled == length:
                yield row
                row, filled = np.empty(length, np.int64), 0


def resize(data: bytes | memoryview) -> np.ndarray:
    """What a peer's user writes: decode in full, then resize."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)))


class WebDataset:
    """Plain webdataset over the shards that metalm reads too."""

    name = "webdataset"

    def write(self, folder: Path, documents: list[np.ndarray], images: list[bytes]) -> None:
        """Writes text/*.tar and images/*.tar."""
        for name, suffix, contents in (
            ("text", "u16", [document.tobytes() for document in documents]),
            ("images", "jpg", images),
        ):
            (folder / name).mkdir(parents=True)
            for shard in range(SHARDS):
                with webdataset.TarWriter(str(folder / name / f"{shard:05d}.tar"), encoder=False) as writer:
                    for number in range(shard, len(contents), SHARDS):
                        writer.write(
                            {"__key__": f"{number:08d}", suffix: contents[number], "txt": b"a photo"}
                        )

    def documents(self, folder: Path) -> Iterator[np.ndarray]:
        """With its shuffle buffer."""
        return (np.frombuffer(sample["u16"], np.uint16) for sample in self._samples(folder / "text"))

    def images(self, folder: Path) -> Iterator[np.ndarray]:
        """Decoded by Pillow."""
        return (resize(sample["jpg"]) for sample in self._samples(folder / "images"))

    def restore(self, folder: Path, fraction: float) -> float:
        """It cannot seek: samples are read and dropped."""
        skipped = int(fraction * sum(1 for _ in self._samples(folder / "text")))
        began = time.perf_counter()
        next(islice(self.documents(folder), skipped, None))
        return time.perf_counter() - began

    def dataset(self, folder: Path) -> IterableDataset:
        """Endless."""
        return self._samples(folder / "text").repeat()

    def _samples(self, folder: Path) -> webdataset.WebDataset:
        shards = sorted(str(path) for path in folder.glob("*.tar"))
        return webdataset.WebDataset(
            shards, shardshuffle=len(shards), seed=1, nodesplitter=None, workersplitter=None
        ).shuffle(256)


class Streaming:
    """MosaicML StreamingDataset over MDS shards."""

    name = "StreamingDataset"

    def write(self, folder: Path, documents: list[np.ndarray], images: list[bytes]) -> None:
        """Writes MDS folders."""
        from streaming import MDSWriter

        for name, contents in (("text", [document.tobytes() for document in documents]), ("images", images)):
            with MDSWriter(out=str(folder / name), columns={"x": "bytes"}, size_limit=16 << 20) as writer:
                for content in contents:
                    writer.write({"x": content})

    def documents(self, folder: Path) -> Iterator[np.ndarray]:
        """Iterated, as in training."""
        return (np.frombuffer(sample["x"], np.uint16) for sample in self.dataset(folder))

    def images(self, folder: Path) -> Iterator[np.ndarray]:
        """Decoded by Pillow."""
        return (resize(sample["x"]) for sample in self._open(folder / "images"))

    def restore(self, folder: Path, fraction: float) -> float:
        """Its state is a number of samples."""
        dataset = self.dataset(folder)
        state = {
            "epoch": 0,
            "sample_in_epoch": int(fraction * dataset.num_samples),
            "num_canonical_nodes": 1,
            "shuffle_seed": 1,
            "initial_physical_nodes": 1,
        }
        began = time.perf_counter()
        dataset.load_state_dict(state)
        next(iter(dataset))
        return time.perf_counter() - began

    def dataset(self, folder: Path) -> Any:
        """One epoch."""
        return self._open(folder / "text")

    def _open(self, folder: Path) -> Any:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        return StreamingDataset(
            local=str(folder), shuffle=True, shuffle_seed=1, num_canonical_nodes=1, batch_size=1
        )


class Energon:
    """Megatron-Energon over the same tar format, prepared by its own factory."""

    name = "Energon"

    def write(self, folder: Path, documents: list[np.ndarray], images: list[bytes]) -> None:
        """Writes tar shards and Energon's index beside them."""
        from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

        WebDataset().write(folder, documents, images)
        text = folder / "text"
        shards = sorted(path.name for path in text.glob("*.tar"))
        BaseWebdatasetFactory.prepare_dataset(
            text, shards, split_parts_ratio=[("train", 1.0)], workers=2, progress_fn=lambda items, _: items
        )
        (text / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )

    def documents(self, folder: Path) -> Iterator[np.ndarray]:
        """Through its savable loader, without workers; as many as the corpus has."""
        loader = self._loader(folder)
        return (np.frombuffer(item, np.uint16) for item in islice(loader, self._count(folder)))

    def images(self, folder: Path) -> None:
        """Not measured: its decoding is that of webdataset with torchvision."""

    def restore(self, folder: Path, fraction: float) -> float:
        """Saves the state after reading that far, and restores it."""
        loader = self._loader(folder)
        for _ in islice(loader, max(1, int(fraction * self._count(folder)))):
            pass
        state = loader.save_state_rank()
        began = time.perf_counter()
        fresh = self._loader(folder)
        fresh.restore_state_rank(state)
        next(iter(fresh))
        return time.perf_counter() - began

    def dataset(self, folder: Path) -> None:
        """Not measured: it brings its own worker processes."""

    def _count(self, folder: Path) -> int:
        info = json.loads((folder / "text" / ".nv-meta" / ".info.json").read_text())
        return sum(info["shard_counts"].values())

    def _loader(self, folder: Path) -> Any:
        from megatron import energon

        @energon.stateless
        def cook(sample: dict) -> energon.CaptioningSample:
            return energon.CaptioningSample(
                **energon.basic_sample_keys(sample), image=sample["u16"], caption=""
            )

        class Encoder(energon.DefaultTaskEncoder):
            decoder = None
            cookers = [energon.Cooker(cook)]  # noqa: RUF012

            def batch(self, samples: list) -> bytes:
                return samples[0].image

        config = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = energon.get_train_dataset(
            folder / "text",
            batch_size=1,
            shuffle_buffer_size=256,
            max_samples_per_sequence=100,
            worker_config=config,
            task_encoder=Encoder(),
        )
        return energon.get_savable_loader(dataset)


class LitData:
    """litdata's StreamingDataset over its optimized chunks."""

    name = "litdata"

    def write(self, folder: Path, documents: list[np.ndarray], images: list[bytes]) -> None:
        """Writes chunks with its writer, without its job runner."""
        from litdata.streaming.writer import BinaryWriter

        for name, contents in (("text", [document.tobytes() for document in documents]), ("images", images)):
            (folder / name).mkdir(parents=True)
            writer = BinaryWriter(str(folder / name), chunk_bytes=16 << 20)
            for number, content in enumerate(contents):
                writer.add_item(number, content)
            writer.done()
            writer.merge()

    def documents(self, folder: Path) -> Iterator[np.ndarray]:
        """Iterated, as in training."""
        return (np.frombuffer(item, np.uint16) for item in self.dataset(folder))

    def images(self, folder: Path) -> Iterator[np.ndarray]:
        """Decoded by Pillow."""
        return (resize(item) for item in self._open(folder / "images"))

    def restore(self, folder: Path, fraction: float) -> float:
        """Through the state of its loader."""
        dataset = self.dataset(folder)
        state = dataset.state_dict(int(fraction * len(dataset)), 0, 1)
        fresh = self.dataset(folder)
        began = time.perf_counter()
        fresh.load_state_dict(state)
        next(iter(fresh))
        return time.perf_counter() - began

    def dataset(self, folder: Path) -> Any:
        """One epoch."""
        return self._open(folder / "text")

    def _open(self, folder: Path) -> Any:
        from litdata import StreamingDataset

        return StreamingDataset(str(folder), shuffle=True, seed=1)
