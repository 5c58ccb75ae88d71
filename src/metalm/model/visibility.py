"""What elements see: the interval masks of a batch, with the segments that its collator found."""

from __future__ import annotations

from metalm.batch import EncoderShare, SemiCausalBatch
from metalm.kernels import IntervalMask, Segments


def share_mask(share: EncoderShare) -> IntervalMask:
    """Of the elements [1, L] of one encoder's share: each sees its whole span."""
    segments = None
    if len(share.segment_bounds):
        segments = Segments(share.segment_bounds, share.longest_segment, False, share.has_padding)
    if share.mask_views.numel():
        return IntervalMask.of_views(share.mask_views, segments)
    start, end = share.attention_start[None], share.attention_end[None]
    return IntervalMask(start, end, start.shape[1], segments)


def batch_mask(batch: SemiCausalBatch) -> IntervalMask:
    """Of the decoder's rows, laid end to end as one: [1, B * S]."""
    segments = None
    if len(batch.segment_bounds):
        segments = Segments(batch.segment_bounds, batch.longest_segment, True, batch.has_padding)
    if batch.mask_views.numel():
        return IntervalMask.of_views(batch.mask_views, segments)
    return IntervalMask.joined(batch.attention_start, batch.attention_end, segments)
