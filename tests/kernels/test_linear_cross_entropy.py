"""The fused output layer and loss: against PyTorch, against Megatron's loss on two ranks, and its memory."""

import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from metalm.kernels import linear_cross_entropy

NUM_POSITIONS, HIDDEN_SIZE, VOCAB_SIZE = 37, 16, 48


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_POSITIONS, HIDDEN_SIZE, generator=generator).to(dtype)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB_SIZE, (NUM_POSITIONS,), generator=generator)
    grad = torch.rand(NUM_POSITIONS, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, grad


def test_loss_and_gradients_equal_pytorch_in_float64() -> None:
    hidden, weight, labels, grad = draw(torch.float64)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    ours = linear_cross_entropy(hidden, weight, labels, chunk_size=10)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(ours, (hidden, weight), grad.double()),
        torch.autograd.grad(expected, (hidden, weight), grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 36, 37, 1000])
def test_any_chunk_size_gives_the_same(chunk_size: int) -> None:
    hidden, weight, labels, _ = draw()
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    ours = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cached", [1, 5 * VOCAB_SIZE, 1000 * VOCAB_SIZE])
def test_low_precision_losses_are_float32(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("metalm.kernels.linear_cross_entropy"), "_CACHED", cached)
    hidden, weight, labels, grad = draw(torch.bfloat16)
    labels[::7] = -1
    ours = linear_cross_entropy(hidden, weight, labels, chunk_size=10)
    logits = (hidden @ weight.T).float()
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(ours, (hidden, weight), grad)
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.bfloat16]
    for one, other in zip(grads, torch.autograd.grad(expected, (hidden, weight), grad), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_negative_labels_have_neither_loss_nor_gradient() -> None:
    hidden, weight, labels, _ = draw()
    labels[::3] = -100
    ours = linear_cross_entropy(hidden, weight, labels, chunk_size=10)
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(ours.sum(), hidden)
    assert not grad[::3].any()


@pytest.mark.parametrize("true_size", [40, 1])
def test_rows_beyond_the_vocabulary_take_no_part(true_size: int) -> None:
    hidden, weight, labels, grad = draw()
    labels = labels % true_size
    ours = linear_cross_entropy(hidden, weight, labels, vocab_size=true_size, chunk_size=10)
    expected = F.cross_entropy(hidden @ weight[:true_size].T, labels, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (grad_weight,) = torch.autograd.grad(ours, weight, grad)
    assert not grad_weight[true_size:].any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels, _ = draw()
    ours = linear_cross_entropy(hidden * 1000, weight, labels)
    expected = F.cross_entropy((hidden * 1000).double() @ weight.double().T, labels, reduction="none")
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(48, 8)}, r"expected \[N, D\] and \[V/tp, D\]"),
        ({"weight": torch.randn(48, 16).double()}, "expected one dtype"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels \[3\]"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    hidden, weight, labels, _ = draw()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **change})  # type: ignore[arg-type]


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used where there is no GPU")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [10, 64])
def test_triton_passes_give_what_pytorch_gives(chunk_size: int, dtype: torch.dtype, device: str) -> None:
    """More columns than a block of the kernel holds, padding beyond them, and labels of none."""
    generator = torch.Generator().manual_seed(1)
    vocab_size, num_rows = 5001, 5120
    hidden = torch.randn(NUM_POSITIONS, HIDDEN_SIZE, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(num_rows, HIDDEN_SIZE, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (NUM_POSITIONS,), generator=generator).to(device)
    labels[::5] = -1
    grad = torch.rand(NUM_POSITIONS, generator=generator).to(device)
    expected = F.cross_entropy(
        (hidden @ weight[:vocab_size].T).float(), labels, reduction="none", ignore_index=-1
    )
    options = {"vocab_size": vocab_size, "chunk_size": chunk_size}
    ours = linear_cross_entropy(hidden, weight, labels, backend="triton", **options)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(ours, (hidden, weight), grad)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(grads, torch.autograd.grad(expected, (hidden, weight), grad), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert not grads[1][vocab_size:].any()


def test_kept_logits_serve_one_backward_and_are_computed_for_a_second() -> None:
    hidden, weight, labels, grad = draw()
    losses = linear_cross_entropy(hidden, weight, labels, chunk_size=64)
    first = torch.autograd.grad(losses, (hidden, weight), grad, retain_graph=True)
    second = torch.autograd.grad(losses, (hidden, weight), grad)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, backward included."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_no_tensor_holds_more_than_a_chunk_of_logits() -> None:
    num_positions, vocab_size, chunk_size = 400, 1000, 25
    hidden = torch.randn(num_positions, 8, requires_grad=True)
    weight = torch.randn(vocab_size, 8, requires_grad=True)
    labels = torch.randint(0, vocab_size, (num_positions,))
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size).sum().backward()
    assert largest.num_elements == chunk_size * vocab_size
    with LargestTensor() as largest:
        F.cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()
    assert largest.num_elements == num_positions * vocab_size


def compare_with_megatron(rank: int, world_size: int, store: str, results: str) -> None:
    """On each rank: ours, Megatron's linear and loss, and PyTorch's on the whole vocabulary."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    group = parallel_state.get_tensor_model_parallel_group()
    hidden, whole_weight, labels, grad = draw()
    rows = slice(rank * VOCAB_SIZE // world_size, (rank + 1) * VOCAB_SIZE // world_size)
    weight = whole_weight.detach()[rows].requires_grad_()

    ours = linear_cross_entropy(hidden, weight, labels, group=group, chunk_size=10)
    our_grads = torch.autograd.grad(ours, (hidden, weight), grad)
    logits = copy_to_tensor_model_parallel_region(hidden, group=group) @ weight.T
    theirs = vocab_parallel_cross_entropy(logits.unsqueeze(1), labels[:, None]).squeeze(1)
    their_grads = torch.autograd.grad(theirs, (hidden, weight), grad)
    alone = F.cross_entropy(hidden @ whole_weight.T, labels, reduction="none")
    lone_grads = torch.autograd.grad(alone, (hidden, whole_weight), grad)

    for expected in ((theirs, *their_grads), (alone, lone_grads[0], lone_grads[1][rows])):
        for one, other in zip((ours, *our_grads), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    # The padding of the vocabulary may cover a whole rank.
    few = labels % 20
    padded = linear_cross_entropy(hidden, weight, few, group=group, vocab_size=20, chunk_size=10)
    (padded_grad,) = torch.autograd.grad(padded, hidden, grad)
    alone = F.cross_entropy(hidden @ whole_weight[:20].T, few, reduction="none")
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded_grad, torch.autograd.grad(alone, hidden, grad)[0], rtol=1e-5, atol=1e-5)
    Path(results, str(rank)).write_text(f"{dist.get_world_size(group)}")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world_size", [1, 2])
def test_equals_megatron_under_tensor_parallelism(world_size: int, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    mp.spawn(compare_with_megatron, (world_size, store, str(tmp_path)), nprocs=world_size)
    assert [(tmp_path / str(rank)).read_text() for rank in range(world_size)] == [
        str(world_size)
    ] * world_size
