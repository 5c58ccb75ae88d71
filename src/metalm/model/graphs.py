"""The decoder's layers from CUDA graphs: each layer's two passes are recorded once, and launched whole.

Launching a layer's kernels one by one, through Python and autograd, takes a host longer than a fast GPU takes
to run them. A graph repeats addresses, not calls, and all that varies from one micro-batch to the next must
lie where it lay: the hidden vectors, the mask's intervals, dropout's seeds and positions are copied there.
What decides which kernels run is the form: shapes, what needs a gradient, and runs of one length, which
attention treats apart. The first micro-batch of a form runs as without graphs, the second is recorded.

What makes it the same computation, to the bit:
- A layer's forward and backward are the same kernels in the same order. Between the layers' graphs, autograd
  runs as ever: one node stands for a layer, and parameters' gradients leave it towards their own
  AccumulateGrad nodes and the hooks that DeepSpeed has put behind those.
- Memory is shared as if nothing were recorded: a graph may write over what graphs before it are done with,
  gradients of weights first of all. So passes run in the order in which they were recorded (layers forward,
  then backward), and no second forward may begin between a forward and its backward: such a one runs without
  graphs. The training step runs its micro-batches one after another.
- A parameter's first gradient of a step is copied, for autograd would keep the memory itself; later ones are
  added where the first lies. AccumulateGrad nodes run before all others, on the stream of the graphs: they
  have read a layer's gradients before the next graph writes there. What DeepSpeed reads afterwards, on
  whichever stream, is `grad`, which is never a graph's memory.
- Parameters stay at their addresses: in the flat buffers of ZeRO 1 and 2. Where one has moved, all is
  recorded anew.

The cost: the activations of a micro-batch stay reserved from the second micro-batch on.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from metalm.config import RunConfig
from metalm.kernels import IntervalMask, backend_counts, count_repeated
from metalm.model.cuda_recorder import Launch, Work
from metalm.model.decoder_layer import Visibility
from metalm.parallel.topology import Topology

MAX_FORMS = 2
"""That are recorded; micro-batches of further ones run without graphs."""

_logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Runs work, or records it: see `CudaRecorder`."""

    def record(self, work: Work) -> tuple[Sequence[Tensor | None], Launch]: ...

    def lend(self, tensor: Tensor) -> Tensor: ...


class GraphRecorder(Recorder, Protocol):
    """A recorder whose work is rehearsed before."""

    def rehearsing(self) -> AbstractContextManager[None]: ...


def why_not_graphs(config: RunConfig, topology: Topology, zero_stage: int) -> str | None:
    """Why the decoder's layers cannot run from graphs in training, or None."""
    if not config.training.cuda_graphs:
        return "training.cuda_graphs is false"
    if topology.device.type != "cuda":
        return f"there are none on {topology.device.type}"
    if zero_stage == 3:
        return "ZeRO 3 gathers each layer's weights anew"
    if config.model.decoder.recompute:
        return "model.decoder.recompute computes layers again in the backward"
    if topology.rows_size > 1:
        return "layers of tensor-parallel and context-parallel ranks exchange what graphs do not hold here"
    return None


class _Form(NamedTuple):
    """What decides which kernels run on which shapes."""

    shape: torch.Size
    dtype: torch.dtype
    needs_gradient: bool
    """Of the input."""
    run_length: int | None
    """Where the mask is made of runs of one length."""


class LayerGraphs:
    """Runs a stack of layers in training: from graphs, where a form has been recorded."""

    def __init__(self, layers: Sequence[nn.Module], recorder: GraphRecorder) -> None:
        self._layers = list(layers)
        self._recorder = recorder
        self._parameters = [parameter for layer in layers for parameter in layer.parameters()]
        self._addresses: tuple[int, ...] = ()
        self._backends: dict[_Form, Counter[str]] = {}
        """Of attention, by forms that ran without graphs."""
        self._stacks: dict[_Form, _Stack | None] = {}
        """None: of a form that cannot be recorded."""
        self._turn: weakref.ref[_Turn] | None = None

    def run(self, hidden: Tensor, seen: Visibility, rotary: Tensor | None) -> Tensor:
        """Output of the last layer, in the memory of the graphs: to be used before the backward reaches it.

        Args:
            hidden: [S, 1, D], the first layer's input.
            seen: of the micro-batch.
            rotary: angles, where positions are.
        """
        addresses = tuple(parameter.data_ptr() for parameter in self._parameters)
        if addresses != self._addresses:
            self._backends, self._stacks, self._addresses = {}, {}, addresses
        form = _Form(hidden.shape, hidden.dtype, hidden.requires_grad, _run_length(seen.mask))
        if not self._is_under_way():
            if form in self._backends and form not in self._stacks and len(self._stacks) < MAX_FORMS:
                self._stacks[form] = self._record(form, hidden, seen, rotary)
            if (stack := self._stacks.get(form)) is not None:
                turn = _Turn(sum(layer.backward is not None for layer in stack.layers))
                self._turn = weakref.ref(turn)
                return stack.run(_inputs(hidden, seen, rotary), turn)
        return self._run_layers(form, hidden, seen, rotary)

    def _is_under_way(self) -> bool:
        """Whether a forward from graphs still has its backward before it."""
        turn = None if self._turn is None else self._turn()
        return turn is not None and turn.to_come > 0

    def _run_layers(self, form: _Form, hidden: Tensor, seen: Visibility, rotary: Tensor | None) -> Tensor:
        before = Counter(backend_counts())
        for layer in self._layers:
            hidden = layer(hidden, attention_mask=seen, rotary_pos_emb=rotary)[0]
        if len(self._stacks) < MAX_FORMS:
            self._backends[form] = Counter(backend_counts()) - before
        return hidden

    def _record(self, form: _Form, hidden: Tensor, seen: Visibility, rotary: Tensor | None) -> _Stack | None:
        began = time.perf_counter()
        inputs = [torch.empty_like(value).copy_(value.detach()) for value in _inputs(hidden, seen, rotary)]
        what = f"micro-batches of {form.shape[0]} positions"
        if form.run_length is not None:
            what += f" in runs of {form.run_length}"
        try:
            before = Counter(backend_counts())
            with self._recorder.rehearsing():
                _build(self._layers, form, inputs, seen, _Rehearsal())
            if (found := Counter(backend_counts()) - before) != self._backends[form]:
                _logger.info(
                    "%s do not run from CUDA graphs: attention would run on %s, and runs on %s",
                    what,
                    ", ".join(found),
                    ", ".join(self._backends[form]),
                )
                return None
            stack = _build(self._layers, form, inputs, seen, self._recorder)
        except Exception as error:  # whatever it is: without graphs the same layers have just run
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            _logger.warning("%s do not run from CUDA graphs, but slower: %s", what, reason)
            return None
        stack.backends = found
        seconds = time.perf_counter() - began
        _logger.info(
            "%d layers run from CUDA graphs for %s, recorded in %.1f s", len(self._layers), what, seconds
        )
        return stack


class _Turn:
    """A forward from graphs, and so many layers' backward passes to come."""

    def __init__(self, to_come: int) -> None:
        self.to_come = to_come


@dataclass
class _Layer:
    """One layer's graphs, and where they read and write."""

    forward: Launch
    output: Tensor
    parameters: tuple[nn.Parameter, ...]
    """That are trained."""
    backward: Launch | None = None
    output_gradient: Tensor | None = None
    input_gradient: Tensor | None = None
    gradients: tuple[Tensor | None, ...] = ()


@dataclass
class _Stack:
    """All layers' graphs of one form, and the memory that is theirs alone."""

    inputs: list[Tensor]
    output_gradient: Tensor
    layers: list[_Layer]
    backends: Counter[str] = field(default_factory=Counter)
    """Calls of attention in one forward."""

    def run(self, inputs: Sequence[Tensor], turn: _Turn) -> Tensor:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value.detach())
        hidden = inputs[0]
        for layer in self.layers:
            hidden = _Replay.apply(layer, turn, hidden, *layer.parameters)
        count_repeated(self.backends)
        return hidden


class _Replay(torch.autograd.Function):
    """A layer whose input lies where its graph reads it: with the layer before, or the stack's inputs."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, turn: _Turn, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.turn = layer, turn
        layer.forward()
        return layer.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        layer: _Layer = ctx.layer
        assert layer.backward is not None and layer.output_gradient is not None
        if grads[0].data_ptr() != layer.output_gradient.data_ptr():
            layer.output_gradient.copy_(grads[0])
        layer.backward()
        ctx.turn.to_come -= 1
        of_parameters = (
            found if found is None or parameter.grad is not None else found.clone()
            for parameter, found in zip(layer.parameters, layer.gradients, strict=True)
        )
        of_input = layer.input_gradient
        return None, None, None if of_input is None else of_input.detach(), *of_parameters


class _Pass:
    """A layer's two passes as work to record, between an input and parameters that end its own graph.

    The parameters are stand-ins with the same memory: AccumulateGrad nodes of their own would belong to the
    recording's stream.
    """

    def __init__(self, layer: nn.Module, hidden: Tensor, seen: Visibility, rotary: Tensor | None) -> None:
        self._layer, self._hidden, self._seen, self._rotary = layer, hidden, seen, rotary
        self._parameters = {
            name: parameter.detach().requires_grad_(parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        }
        self.output: Tensor = hidden
        self.output_gradient: Tensor | None = None

    def forward(self) -> list[Tensor]:
        options = {"attention_mask": self._seen, "rotary_pos_emb": self._rotary}
        with torch.enable_grad():
            self.output = functional_call(self._layer, self._parameters, (self._hidden,), options)[0]
        return [self.output.detach()]

    def backward(self) -> list[Tensor | None]:
        """The gradients of the input, or None, and of the trained parameters."""
        wanted = [value for value in self._parameters.values() if value.requires_grad]
        if self._hidden.requires_grad:
            wanted.insert(0, self._hidden)
        found = torch.autograd.grad(self.output, wanted, self.output_gradient, allow_unused=True)
        return list(found) if self._hidden.requires_grad else [None, *found]


class _Rehearsal:
    """A recorder that runs the work and keeps nothing."""

    def record(self, work: Work) -> tuple[Sequence[Tensor | None], Launch]:
        return work(), lambda: None

    def lend(self, tensor: Tensor) -> Tensor:
        return tensor


def _build(
    layers: Sequence[nn.Module], form: _Form, inputs: list[Tensor], seen: Visibility, recorder: Recorder
) -> _Stack:
    """Record the layers forward, then backward, on inputs that lie where they will always lie."""
    hidden, still, rotary = _take_apart(inputs, form, seen)
    passes = [_Pass(layers[0], hidden.detach().requires_grad_(form.needs_gradient), still, rotary)]
    built = [_record_forward(passes[0], layers[0], recorder)]
    for layer in layers[1:]:
        needs_gradient = passes[-1].output.requires_grad
        passes.append(_Pass(layer, built[-1].output.detach().requires_grad_(needs_gradient), still, rotary))
        built.append(_record_forward(passes[-1], layer, recorder))
    output_gradient = torch.zeros_like(built[-1].output)
    gradient: Tensor | None = output_gradient
    for layer_graphs in reversed(built):
        # No name may hold what a layer leaves behind: the next one is recorded over it.
        gradient = _record_backward(passes.pop(), layer_graphs, gradient, recorder)
    return _Stack(inputs, output_gradient, built)


def _record_forward(both: _Pass, layer: nn.Module, recorder: Recorder) -> _Layer:
    (output,), launch = recorder.record(both.forward)
    assert output is not None
    return _Layer(launch, output, tuple(part for part in layer.parameters() if part.requires_grad))


def _record_backward(
    both: _Pass, layer: _Layer, gradient: Tensor | None, recorder: Recorder
) -> Tensor | None:
    """From the gradient of a layer's output to that of its input, None where it needs none."""
    of_input: Tensor | None = None
    if gradient is not None and both.output.requires_grad:
        both.output_gradient = gradient
        (of_input, *of_parameters), layer.backward = recorder.record(both.backward)
        layer.output_gradient = recorder.lend(gradient)
        layer.input_gradient = None if of_input is None else recorder.lend(of_input)
        layer.gradients = tuple(None if found is None else recorder.lend(found) for found in of_parameters)
    layer.output = recorder.lend(layer.output)
    return of_input


def _inputs(hidden: Tensor, seen: Visibility, rotary: Tensor | None) -> list[Tensor]:
    """All that varies between micro-batches of one form."""
    found = [hidden, seen.mask.start, seen.mask.end]
    if rotary is not None:
        found.append(rotary)
    if seen.dropout is not None:
        found += [seen.dropout.seeds, seen.dropout.positions]
    return found


def _take_apart(
    inputs: list[Tensor], form: _Form, seen: Visibility
) -> tuple[Tensor, Visibility, Tensor | None]:
    """What `_inputs` has put together, with a new mask: what is derived of it is recorded, too."""
    hidden, start, end, *more = inputs
    dropout = seen.dropout
    if dropout is not None:
        positions, seeds = more.pop(), more.pop()
        dropout = replace(dropout, seeds=seeds, positions=positions)
    segments = seen.mask.segments if form.run_length is not None else None
    mask = IntervalMask(start, end, seen.mask.num_keys, segments)
    return hidden, replace(seen, mask=mask, dropout=dropout), more[0] if more else None


def _run_length(mask: IntervalMask) -> int | None:
    segments = mask.segments
    if segments is None or not segments.is_uniform(mask.batch_size * mask.num_queries):
        return None
    return segments.longest
