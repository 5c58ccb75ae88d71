"""How commands with ranks start: what is read, the libraries of training, the job's other ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from metalm.errors import MetaLMError
from metalm.progress import Phase

if TYPE_CHECKING:
    from metalm.data.corpus import Corpus
    from metalm.training.joining import Joined


def join_ranks(prepare: Callable[[int], Corpus]) -> Joined:
    """Join the ranks of a job, with what the first rank of each node has read and checked.

    What cannot start is refused before anything that is slow to load is imported.

    Args:
        prepare: reads and checks, for so many ranks.

    Collective: all ranks of the job.
    """
    from metalm.parallel.launch import find_launch

    launch = find_launch(os.environ)
    own: Corpus | MetaLMError | None = None
    if launch.local_rank == 0:
        try:
            with Phase("reading the configuration, and opening what it names", told=True):
                own = prepare(launch.world_size)
        except MetaLMError as error:
            if launch.world_size == 1:
                raise
            own = error  # the other ranks are told
    with Phase("loading torch", told=True):
        set_up_libraries()
        from metalm.training.joining import join

    with Phase(f"joining {launch.world_size} rank(s)", told=True):
        return join(launch, own)


def set_up_libraries() -> None:
    """Set what the libraries of training read when they are imported, and who multiplies matrices on CPU.

    DeepSpeed gets its device.
    """
    import torch

    from metalm.kernels.cpu_matmul import multiply_by_onednn

    multiply_by_onednn()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from metalm.parallel.megatron_import import import_megatron

    import_megatron()
