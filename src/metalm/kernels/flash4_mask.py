"""The interval mask as `mask_mod`s of FlashAttention 4, which compiles them into its kernels.

The forward reads the bounds of a pair's query, the backward those of its key: of the two, the one of which a
thread holds few. Bounds are loaded by an instruction that the compiler takes for pure, so that it loads them
once for a row of pairs, and not for each pair. Imported only where the package is installed.
"""

# No `from __future__ import annotations`: the compiler of the kernels reads this file's functions.
import hashlib
from pathlib import Path

import cutlass
from cutlass import cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from flash_attn.cute.utils import elem_pointer, scalar_to_ssa


@cute.jit
def query_sees(batch, head, query, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """Whether the key is in the query's interval; `aux_tensors` as `_is_inside` takes them, by query."""
    return _is_inside(key, aux_tensors, batch[0], query[0])


@cute.jit
def key_is_seen(batch, head, query, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    """Whether the query is in the key's interval; `aux_tensors` as `_is_inside` takes them, by key."""
    return _is_inside(query, aux_tensors, batch[0], key[0])


@cute.jit
def _is_inside(place, intervals, row, owner):  # type: ignore[no-untyped-def]
    """Whether a place is in the owner's interval; `intervals` are firsts and lengths, int32 `[B, owners]`."""
    firsts, lengths = intervals
    first = scalar_to_ssa(_load(elem_pointer(firsts, (row, owner))), cutlass.Int32)
    length = scalar_to_ssa(_load(elem_pointer(lengths, (row, owner))), cutlass.Int32)
    # A place before the first becomes a large unsigned number.
    return (place - first).to(cutlass.Uint32) < length.to(cutlass.Uint32)


@dsl_user_op
def _load(pointer, *, loc=None, ip=None):  # type: ignore[no-untyped-def]
    """A 32-bit integer that no kernel writes."""
    loaded = llvm.inline_asm(
        T.i32(),
        [pointer.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)],
        "ld.global.nc.b32 $0, [$1];",
        "=r,l",
        has_side_effects=False,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return cutlass.Int32(loaded)


# Kept kernels are found by this. Of themselves, functions are told apart by their own lines, not by those of
# what they call.
_source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
query_sees.__cute_hash__ = f"metalm query_sees {_source}"
key_is_seen.__cute_hash__ = f"metalm key_is_seen {_source}"
