"""What a checkpoint of many ranks costs those who publish and read it; one process writes all parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.many_ranks import as_before, jobs_of, share, write_checkpoint
from metalm.checkpoint.format import INDEX_NAME, ParameterIndex, Pieces, read_index, write_index
from metalm.checkpoint.layout import ShardLayout
from metalm.checkpoint.reader import CheckpointReader

LANES = {lane: {"lane": lane} for lane in range(64)}
SHAPES = {
    "decoder": {"embedding": (64, 32), "norm": (40,)},
    "encoders": {f"layer.{number}": (48, 16) for number in range(4)},
}


@pytest.mark.parametrize(("writers", "readers"), [(1, 8), (8, 8), (8, 3), (5, 16)])
def test_a_rank_reads_its_own_ranges_and_no_more(tmp_path: Path, writers: int, readers: int) -> None:
    """So that the bytes that one rank reads fall as ranks are added."""
    folder = write_checkpoint(jobs_of(tmp_path, 3, writers, SHAPES, LANES))
    whole = 4 * sum(int(np.prod(shape)) for own in SHAPES.values() for shape in own.values())
    for rank in range(readers):
        reader = CheckpointReader(folder)
        expected = 0
        for component, own in SHAPES.items():
            for name, shape in own.items():
                start, size = share(int(np.prod(shape)), rank, readers)
                found = reader.read_range(component, name, "exp_avg", ShardLayout(shape), 0, start, size)
                assert torch.equal(found, torch.arange(start, start + size, dtype=torch.float32) + 1)
                expected += 4 * size
        assert reader.bytes_read == expected <= whole / readers + 4 * 6


@pytest.mark.parametrize("writers", [8, 64])
def test_a_rank_reads_the_states_of_its_own_lanes_from_as_few_files(
    tmp_path: Path, writers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CheckpointReader(write_checkpoint(jobs_of(tmp_path, 3, writers, SHAPES, LANES)))
    opened: list[Path] = []
    read = CheckpointReader.path_of

    def note(self: CheckpointReader, name: str) -> Path:
        opened.append(read(self, name))
        return opened[-1]

    monkeypatch.setattr(CheckpointReader, "path_of", note)
    own = range(64 // writers * 3, 64 // writers * 4)  # the fourth rank of as many
    assert reader.lane_states(own, 64).keys() == set(own)
    assert len(opened) == 1
    assert len(reader.lane_states(range(16), 64)) == 16  # on four ranks
    assert len(opened) == 1 + writers // 4
    assert reader.lane_states().keys() == set(range(64))
    opened.clear()
    assert reader.lane_states([5], 7).keys() >= {5}  # lanes that lie elsewhere are found all the same


def test_an_index_of_before_is_read_as_that_of_now(tmp_path: Path) -> None:
    folder = write_checkpoint(jobs_of(tmp_path, 3, 8, SHAPES, LANES))
    now = read_index(folder / "encoders")
    size_now = (folder / "encoders" / INDEX_NAME).stat().st_size
    as_before(folder, "encoders")
    before = read_index(folder / "encoders")
    assert (folder / "encoders" / INDEX_NAME).stat().st_size > 2 * size_now
    assert before.keys() == now.keys()
    for name, index in before.items():
        assert list(index.columns) == list(now[name].columns) and index.layout == now[name].layout
        assert index.states == now[name].states


def test_an_index_of_a_thousand_ranks_is_small(tmp_path: Path) -> None:
    """A ZeRO 3 component of 50 parameters: a piece of each on every rank."""
    ranks, size = 1024, 4096 * 4096
    names = [f"rank_{rank:05d}.safetensors" for rank in range(ranks)]
    pieces = Pieces(
        names,
        range(ranks),
        [0] * ranks,
        [size // ranks * rank for rank in range(ranks)],
        [size // ranks] * ranks,
    )
    index = ParameterIndex((4096, 4096), None, 1, 1, pieces)
    write_index(tmp_path, {f"layer.{number}": index for number in range(50)})
    assert (tmp_path / INDEX_NAME).stat().st_size / (50 * ranks) < 25  # bytes a piece
    found = read_index(tmp_path)["layer.7"].columns
    (piece,) = found.under(0, 5 * size // ranks, 10)
    assert piece.file == "rank_00005.safetensors" and piece.size == size // ranks
    assert [one.file for one in found.under(0, 5 * size // ranks - 1, 2)] == names[4:6]
