"""The files that one rank of many opens and looks at until it has its weights and data, resuming a run.

The rank is simulated: on torch's fake process group nothing is sent, and what the first rank says to all is
read before the counting begins. Arguments: folders, with colons between, that hold all that is read, pipeline
in it, number of ranks, ranks of a node, rank, overrides.
"""

import faulthandler
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from metalm.checkpoint import reader
from metalm.config import load_config
from metalm.data.corpus import Corpus
from metalm.objectives import build_objective
from metalm.parallel.launch import Launch
from metalm.parallel.topology import build_topology, close_topology
from metalm.training import joining
from metalm.training import start as start_module
from metalm.training.check_start import check_start
from metalm.training.checkpoint import CheckpointStore
from metalm.training.engines import build_engines


class Files:
    """Counts what is opened and asked for below some folders."""

    def __init__(self, folders: tuple[str, ...]) -> None:
        self._folders = folders
        self.counts: Counter[str] = Counter()
        self._stat, self._open_tensors = os.stat, reader.safe_open
        sys.addaudithook(self._on_event)
        os.stat, reader.safe_open = self._count_stat, self._count_tensors  # neither raises an event

    def _count(self, kind: str, path: Any) -> None:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self._folders):
            self.counts[kind] += 1

    def _on_event(self, event: str, arguments: Any) -> None:
        if event in ("open", "os.listdir", "os.scandir"):
            self._count("opens", arguments[0])

    def _count_stat(self, path: Any, *arguments: Any, **options: Any) -> Any:
        self._count("stats", path)
        return self._stat(path, *arguments, **options)

    def _count_tensors(self, path: Any, *arguments: Any, **options: Any) -> Any:
        self._count("opens", path)
        return self._open_tensors(path, *arguments, **options)

    def take(self) -> dict[str, int]:
        """What was counted since the last time."""
        counts, self.counts = self.counts, Counter()
        return {kind: counts[kind] for kind in ("opens", "stats")}


def main() -> None:
    faulthandler.enable()
    folders, pipeline, world_size, per_node, number, *overrides = sys.argv[1:]
    ranks, rank = int(world_size), int(number)
    launch = Launch(rank, ranks, rank % int(per_node), "127.0.0.1", 1, "simulated")
    os.environ.update(launch.environment())  # DeepSpeed asks for it
    first = Corpus(load_config(Path(pipeline), overrides))
    said = [(first.config, first.tokenizer.definition)]

    def hear(objects: list[Any], *arguments: Any, **options: Any) -> None:
        """What the first rank says at the start; later it says what this rank has found as well."""
        if objects == [None]:
            objects[:] = said

    def open_fake(launch: Launch, minutes: int) -> torch.device:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        return torch.device("cpu")

    dist.broadcast_object_list, joining.open_process_group = hear, open_fake
    dist.distributed_c10d._set_pg_timeout = lambda timeout, group: None
    files, found = Files(tuple(folders.split(":"))), {}
    own = None if launch.local_rank else check_start(load_config(Path(pipeline), overrides), ranks)
    found["config, tokenizer and shards"] = files.take()
    corpus = joining.join(launch, own).corpus
    config = corpus.config
    topology = build_topology(config.parallel.tensor, torch.device("cpu"))
    run_folder = config.run.folder / config.run.name
    start = start_module.decide_start(corpus, CheckpointStore(run_folder, config, topology))
    assert start.checkpoint is not None
    found["checkpoint, hashed and opened"] = files.take()
    engines = build_engines(config, topology, start.given)
    found["engines"] = files.take()
    start_module.load_start(start, config, topology, engines)
    found["weights"] = files.take() | {"bytes": start.checkpoint.bytes_read}
    states = start_module._own_lane_states(start.checkpoint, config, topology)
    data = start_module._open_data(corpus, build_objective(config), topology, states)
    assert data is not None
    found["data"] = files.take()
    data.close()
    print("RESULT " + json.dumps(found), flush=True)
    close_topology()


if __name__ == "__main__":
    main()
