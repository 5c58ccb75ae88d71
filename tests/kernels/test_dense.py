"""The reference itself, against PyTorch's attention and against the formula."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from metalm.kernels import IntervalMask, RelativeBias, interval_attention, t5_relative_buckets


def test_equals_sdpa_in_float64(make_documents: Callable[..., IntervalMask]) -> None:
    q, k, v, grad = (torch.randn(2, 3, 63, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    mask = make_documents(2, 63, 0)
    dense = mask.to_dense()[:, None]
    seen = dense.any(-1, keepdim=True)
    ours = interval_attention(q, k, v, mask, backend="dense")
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=dense | ~seen) * seen
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for one, other in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_bias_is_added_to_the_scaled_scores() -> None:
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for length in (5, 9, 9))
    table = torch.randn(2, 32, dtype=torch.float64)
    distance = torch.arange(9)[None, :] - torch.arange(5)[:, None]
    scores = q @ k.mT / 8**0.5 + table[:, t5_relative_buckets(distance)]
    hidden = ~IntervalMask.causal(5, 9).to_dense()
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    mask = IntervalMask.causal(5, 9)
    ours = interval_attention(q, k, v, mask, bias=RelativeBias(table), backend="dense")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
