"""Interval attention beside its peers, in one run: time, rate over visible pairs, and peak memory.

Peers take turns, repetition by repetition, so that a disturbance meets all of them; times are medians.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metalm.kernels.attention import Backend, interval_attention
from metalm.kernels.interval_mask import IntervalMask
from metalm.kernels.listed_blocks import list_blocks

MASK_KINDS = ("causal", "packed documents", "semi-causal packed", "encoder", "images")
_IMAGE = 256
BACKENDS: tuple[Backend, ...] = ("flash4", "flash", "triton")
"""Of ours, forced by name."""
PEERS = ("interval", *BACKENDS, "flash4 direct", "sdpa dense", "sdpa per document", "flex", "flex flash")
# Matrix products of head_size multiply-adds per visible pair: two forward, five backward.
_FORWARD_OPERATIONS, _BACKWARD_OPERATIONS = 4, 10

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One mask and shape. Documents differ in length, the first half as long as the last; images do not."""

    kind: str
    length: int
    num_documents: int
    batch_size: int
    num_heads: int
    head_size: int

    def document_edges(self) -> list[int]:
        """Where documents start, and the length; one document under the causal mask."""
        if self.kind == "causal":
            return [0, self.length]
        if self.kind == "images":
            return [*range(0, self.length, min(_IMAGE, self.length)), self.length]
        steps = torch.linspace(1.0, 2.0, self.num_documents).cumsum(0)
        return [0, *(int(edge) for edge in (steps / steps[-1] * self.length).round())]

    def mask(self, device: torch.device) -> IntervalMask:
        """The mask, of batch size 1; in the semi-causal one, spans of 24 begin every 64 positions."""
        edges = torch.tensor(self.document_edges(), dtype=torch.int32)
        start = edges[:-1].repeat_interleave(edges.diff().long())[None]
        end = edges[1:].repeat_interleave(edges.diff().long())[None]
        if self.kind in ("encoder", "images"):
            return IntervalMask.packed_spans(start, end).validate().to(device)
        inside = torch.arange(self.length, dtype=torch.int32)[None] - start
        span_end = torch.where(inside % 64 < 24, start + inside // 64 * 64 + 24, 0).minimum(end)
        bidirectional = self.kind == "semi-causal packed"
        mask = IntervalMask.semi_causal(start, span_end, bidirectional_spans=bidirectional)
        return mask.validate().to(device)


def measure(
    case: Case,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    peers: tuple[str, ...],
    repetitions: int,
    max_dense_length: int,
) -> list[dict[str, Any]]:
    """One record per peer: milliseconds, TFLOP/s over visible pairs, peak MiB, and time over ours.

    Args:
        case: mask and shapes.
        device: where to run.
        dtype: of q, k and v.
        backward: time forward and backward together, not forward alone.
        peers: of `PEERS`.
        repetitions: timed ones, after two that are not.
        max_dense_length: length beyond which dense SDPA is left out, for its time and memory.

    A peer that cannot run gets the reason in place of figures.

    Raises:
        RuntimeError: our own attention cannot run.
        ValueError: a peer is not of `PEERS`.
    """
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}, expected one of {', '.join(PEERS)}")
    mask = case.mask(device)
    generator = torch.Generator(device).manual_seed(0)
    # In memory as a model's projections leave it: the heads of a position side by side.
    shape = (case.batch_size, case.length, case.num_heads, case.head_size)
    drawn = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4))
    q, k, v, grad = (x.transpose(1, 2) for x in drawn)
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]
    records, runs = [], {}
    for peer in peers:
        record = {
            "mask": case.kind,
            "length": case.length,
            "batch_size": case.batch_size,
            "num_heads": case.num_heads,
            "head_size": case.head_size,
            "pass": "forward + backward" if backward else "forward",
            "peer": peer,
        }
        records.append(record)
        try:
            attention = _peer(peer, case, mask, device, max_dense_length)
            run = _bind(attention, inputs, grad, backward)
            run()
            record["peak_mib"] = peak_memory(run, device)
            runs[peer] = run
        except Exception as error:  # such as out of memory, or not implemented on this device
            if peer == "interval":
                raise  # ours is to run everywhere; that another does not is a result
            record["not_run"] = next(iter(str(error).strip().splitlines()), type(error).__name__)
    times = interleaved_times(runs, repetitions, device)
    operations = _FORWARD_OPERATIONS + (_BACKWARD_OPERATIONS if backward else 0)
    pairs = int(mask.visible_pairs().sum()) * case.batch_size * case.num_heads
    for record in records:
        if record["peer"] in times:
            seconds = times[record["peer"]]
            record["ms"] = seconds * 1e3
            record["tflops"] = operations * case.head_size * pairs / seconds / 1e12
            if "interval" in times:
                record["times_ours"] = seconds / times["interval"]
    return records


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's practical limit: the rate of one large square product."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = interleaved_times({"matmul": lambda: a @ b}, 5, device)["matmul"]
    return 2 * size**3 / seconds / 1e12


def interleaved_times(
    runs: dict[str, Callable[[], object]], repetitions: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 2):
        for name, run in runs.items():
            _synchronize(device)
            begin = time.perf_counter()
            run()
            _synchronize(device)
            if repetition >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a run needs at its peak, beyond what was there before; None where the system cannot tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not sys.platform.startswith("linux"):
        return None
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kibibytes(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1])

    # The C library gives back what it kept, and Linux starts the high-water mark again at the current size.
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    before = kibibytes("VmRSS")
    run()
    return (kibibytes("VmHWM") - before) / 1024


def _bind(attention: Attention, inputs: list[Tensor], grad: Tensor, backward: bool) -> Callable[[], object]:
    if backward:
        return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)
    return lambda: attention(*inputs)


def _peer(
    peer: str, case: Case, mask: IntervalMask, device: torch.device, max_dense_length: int
) -> Attention:
    if peer == "interval":
        return lambda q, k, v: interval_attention(q, k, v, mask)
    if peer in BACKENDS:
        return _forced(peer, mask)
    if peer == "flash4 direct":
        return _flash4_direct(case, device)
    if peer == "sdpa per document":
        return _per_document(case, mask)
    if peer in ("flex", "flex flash"):
        return _flex(mask, {"BACKEND": "FLASH"} if peer == "flex flash" else None)
    if case.length > max_dense_length:
        raise RuntimeError(f"dense masks are measured up to length {max_dense_length}")
    dense = mask.to_dense()[:, None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)


def _forced(backend: Any, mask: IntervalMask) -> Attention:
    """Ours by one backend; that it does not take a call is a result."""
    return lambda q, k, v: interval_attention(q, k, v, mask, backend=backend)


def _flash4_direct(case: Case, device: torch.device) -> Attention:
    """FlashAttention 4 without us: its causal form, and for documents its form for rows of any lengths."""
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise RuntimeError(f"needs flash-attn-4: {error}") from error
    if case.kind == "causal":

        def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)[0]
            return out.transpose(1, 2)

        return causal
    if case.kind == "semi-causal packed":
        raise RuntimeError("has no form of its own for spans seen whole in causal documents")
    edges, rows = torch.tensor(case.document_edges(), dtype=torch.int32), torch.arange(case.batch_size)
    starts = edges[:-1] + (rows * case.length).int()[:, None]
    bounds = F.pad(starts.view(-1), (0, 1), value=case.batch_size * case.length).to(device)
    longest = int(edges.diff().max())
    is_causal = case.kind == "packed documents"

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        joined = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v))
        out: Tensor = flash_attn_varlen_func(
            *joined,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=is_causal,
        )[0]
        return out.view(q.shape[0], q.shape[2], *out.shape[1:]).transpose(1, 2)

    return attention


def _per_document(case: Case, mask: IntervalMask) -> Attention:
    """What one would write by hand: a call per document, with the fastest form of its mask."""
    edges = case.document_edges()
    documents = [slice(first, last) for first, last in pairwise(edges)]
    options: list[dict[str, Any]] = [{"is_causal": case.kind not in ("encoder", "images")} for _ in documents]
    if case.kind == "semi-causal packed":
        whole = mask.to_dense()[:, None]
        options = [{"attn_mask": whole[:, :, rows, rows].contiguous()} for rows in documents]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = [
            F.scaled_dot_product_attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], **option)
            for rows, option in zip(documents, options, strict=True)
        ]
        return torch.cat(outs, dim=2)

    return attention


def _flex(mask: IntervalMask, options: Any) -> Attention:
    """Compiled FlexAttention with a BlockMask built from our block ranges; `options` choose its kernels."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    block = 128
    blocks = list_blocks(mask.block_ranges(block, block), -(-mask.num_keys // block))
    start, end = mask.start[0], mask.end[0]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= start[query]) & (key < end[query])

    block_mask = BlockMask.from_kv_blocks(
        *blocks,
        BLOCK_SIZE=block,
        mask_mod=visible,
        seq_lengths=(mask.num_queries, mask.num_keys),
    )
    torch._dynamo.reset()  # else shapes of earlier cases make it compile for any, which is slower
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, kernel_options=options)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
