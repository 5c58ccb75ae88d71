"""The interval mask as a `mask_mod` of FlashAttention 4, which compiles it into its kernels."""

# No `from __future__ import annotations`: the compiler of the kernels reads this file's functions.
import cutlass
from cutlass import cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def is_visible(batch, head, query, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """Whether the key lies in the query's interval; `aux_tensors` are start and end, int32 `[B, >= Sq]`."""
    starts, ends = aux_tensors
    start = scalar_to_ssa(starts[batch[0], query[0]], cutlass.Int32)
    end = scalar_to_ssa(ends[batch[0], query[0]], cutlass.Int32)
    return (key >= start) & (key < end)
