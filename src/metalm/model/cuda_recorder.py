"""Records work on a CUDA device as graphs that share one pool of memory.

All graphs of a recorder are recorded and launched in one order, so what one has no more use for may lie under
what the next writes, as it would without graphs. Results are therefore lent: their owner lets them go when
the recorder has gone past their last reader, and their memory serves the next graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Work = Callable[[], Sequence[Tensor | None]]
Launch = Callable[[], None]


class CudaRecorder:
    """Records on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin()

    def _begin(self) -> None:
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._keeps_pool: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Around work that is about to be recorded, and runs once as it is: all that is made at first use.

        Not on the recording stream, or its libraries' workspaces would lie outside the pool.
        """
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # a recording cannot ask for memory that lies idle elsewhere

    def record(self, work: Work) -> tuple[Sequence[Tensor | None], Launch]:
        """Record what `work` has the device do, without doing it.

        Returns:
            The results, which hold nothing yet, and what fills them.

        Raises:
            RuntimeError: the work waits for the device, or does something else that cannot be recorded. The
                process goes on as before.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            try:
                # Other threads, such as those that pin memory or watch collectives, do not belong to it.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                results = work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        self._keeps_pool = graph
        return results, graph.replay

    def lend(self, tensor: Tensor) -> Tensor:
        """The same memory without a hold on it."""
        return torch.as_tensor(_Address(tensor), device=tensor.device).view(tensor.dtype)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leave the allocator and torch's generator as they were, and begin with a new stream and pool.

        An end that fails takes the stream out of the recording, but leaves the rest to us.
        """
        index = self._device.index or 0
        try:
            graph.capture_end()
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # the end may have come so far
                torch._C._cuda_endAllocateToPool(index, self._pool)
                torch._C._cuda_releasePool(index, self._pool)
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())
        self._begin()


class _Address:
    """Where a tensor's memory lies, by the protocol that `torch.as_tensor` reads; it knows no bfloat16."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(step * size for step in tensor.stride()),
            "typestr": f"<i{size}",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }
