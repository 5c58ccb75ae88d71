"""Layers from CUDA graphs: the two passes of each are recorded once, and launched whole.

Launching a layer's kernels one by one, through Python and autograd, takes a host longer than a fast GPU takes
to run them. A graph repeats addresses, not calls, and all that varies from one micro-batch to the next must
lie where it lay: the hidden vectors, the mask's intervals, dropout's seeds and positions, an encoder's routes
and bias are copied there. What decides which kernels run is the form: shapes, what needs a gradient, and runs
of one length, which attention treats apart. The first micro-batch of a form runs as without graphs, the
second is recorded.

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

Decoder and encoders each have graphs and a pool of their own: their passes interleave, each other's memory
stays alone. The forms of one stack share its pool, since one micro-batch at a time is under way.

The cost: the activations of the largest recorded micro-batch stay reserved from the second micro-batch on.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from metalm.kernels import backend_counts
from metalm.kernels.attention import count_repeated
from metalm.model.cuda_recorder import Launch, Work
from metalm.model.graph_inputs import Arguments, LayerInputs

MAX_FORMS, MAX_ENCODER_FORMS = 2, 12
"""That are recorded; micro-batches of further ones run without graphs. Encoders' shares vary in length."""

Run = Callable[[nn.Module, Tensor], Tensor]
"""Runs a layer on hidden vectors; the layers of a forward in order."""

_logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Runs work, or records it: see `CudaRecorder`."""

    def record(self, work: Work) -> tuple[Sequence[Tensor | None], Launch]: ...

    def lend(self, tensor: Tensor) -> Tensor: ...


class GraphRecorder(Recorder, Protocol):
    """A recorder whose work is rehearsed before."""

    def rehearsing(self) -> AbstractContextManager[None]: ...


class _Form(NamedTuple):
    """What decides which kernels run on which shapes."""

    shape: torch.Size
    dtype: torch.dtype
    needs_gradient: bool
    """Of the input."""
    run_length: int | None
    """Where the mask is made of runs of one length."""
    shapes: tuple[torch.Size, ...]
    """Of what varies beside the mask."""


class LayerGraphs:
    """Runs a stack of layers in training: from graphs, where a form has been recorded."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        recorder: GraphRecorder,
        *,
        what: str = "micro-batches",
        max_forms: int = MAX_FORMS,
    ) -> None:
        """Run some layers.

        Args:
            layers: in the order of the forward.
            recorder: of these layers alone.
            what: runs from graphs, in messages.
            max_forms: that are recorded.
        """
        self._what, self._max_forms = what, max_forms
        self._layers = list(layers)
        self._recorder = recorder
        self._parameters = [parameter for layer in layers for parameter in layer.parameters()]
        self._addresses: tuple[int, ...] = ()
        self._backends: dict[_Form, set[str]] = {}
        """Of attention, by forms that ran without graphs."""
        self._stacks: dict[_Form, _Stack | None] = {}
        """None: of a form that cannot be recorded."""
        self._turn: weakref.ref[_Turn] | None = None
        self._is_full = False

    @property
    def num_forms(self) -> int:
        """That run from graphs."""
        return sum(stack is not None for stack in self._stacks.values())

    def start(self, launch: Run, hidden: Tensor, inputs: LayerInputs) -> Run:
        """What runs the layers of one forward; its outputs are to be used before the backward reaches them.

        Args:
            launch: runs a layer without graphs.
            hidden: of the form of the first layer's input.
            inputs: of the micro-batch, beside the hidden vectors.
        """
        addresses = tuple(parameter.data_ptr() for parameter in self._parameters)
        if addresses != self._addresses:
            self._backends, self._stacks, self._addresses = {}, {}, addresses
        shapes = tuple(tensor.shape for tensor in inputs.varying)
        form = _Form(hidden.shape, hidden.dtype, hidden.requires_grad, inputs.run_length, shapes)
        if form not in self._stacks and len(self._stacks) == self._max_forms and not self._is_full:
            _logger.info("%s of further forms than %d run without CUDA graphs", self._what, self._max_forms)
            self._is_full = True
        if not self._is_under_way():
            if form in self._backends and form not in self._stacks and len(self._stacks) < self._max_forms:
                self._stacks[form] = self._record(form, hidden, inputs)
            if (stack := self._stacks.get(form)) is not None:
                turn = _Turn(sum(layer.backward is not None for layer in stack.layers))
                self._turn = weakref.ref(turn)
                return stack.start(inputs.tensors, turn)
        return self._watched(launch, form)

    def _is_under_way(self) -> bool:
        """Whether a forward from graphs still has its backward before it."""
        turn = None if self._turn is None else self._turn()
        return turn is not None and turn.to_come > 0

    def _watched(self, launch: Run, form: _Form) -> Run:
        """The launch itself, and attention's backends are remembered while forms are yet to be recorded."""
        if form in self._stacks or len(self._stacks) == self._max_forms:
            return launch
        backends = self._backends.setdefault(form, set())

        def run(layer: nn.Module, hidden: Tensor) -> Tensor:
            before = Counter(backend_counts())
            output = launch(layer, hidden)
            backends.update(Counter(backend_counts()) - before)
            return output

        return run

    def _record(self, form: _Form, hidden: Tensor, inputs: LayerInputs) -> _Stack | None:
        began = time.perf_counter()
        tensors = [value.detach().clone() for value in inputs.tensors]
        place = torch.zeros_like(hidden)
        what = f"{self._what} of {form.shape[0]} positions"
        if form.run_length is not None:
            what += f" in runs of {form.run_length}"
        try:
            before = Counter(backend_counts())
            with self._recorder.rehearsing():
                _build(self._layers, form, place, tensors, inputs, _Rehearsal())
            found = Counter(backend_counts()) - before
            if (expected := self._backends[form]) != set(found):
                # The backend goes by where documents lie, which graphs know on the device alone.
                raise RuntimeError(f"attention would run on {', '.join(found)}, not on {', '.join(expected)}")
            reserved = _reserved_gib(place.device)
            stack = _build(self._layers, form, place, tensors, inputs, self._recorder)
        except Exception as error:  # whatever it is: without graphs the same layers have just run
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            _logger.warning("%s run without CUDA graphs, and so slower: %s", what, reason)
            return None
        stack.backends = found
        _logger.info(
            "%s run %d layers from CUDA graphs, recorded in %.1f s, in %.1f GiB",
            what,
            len(self._layers),
            time.perf_counter() - began,
            _reserved_gib(place.device) - reserved,
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
    input: Tensor
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
    kept: tuple[Tensor, Tensor]
    """The first layer's input, and the gradient of the last one's output."""
    layers: list[_Layer]
    backends: Counter[str] = field(default_factory=Counter)
    """Calls of attention in one forward."""

    def start(self, inputs: Sequence[Tensor], turn: _Turn) -> Run:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        count_repeated(self.backends)
        layers = iter(self.layers)

        def run(layer: nn.Module, hidden: Tensor) -> Tensor:
            graphs = next(layers)
            output: Tensor = _Replay.apply(graphs, turn, hidden, *graphs.parameters)
            if graphs is self.layers[-1] and graphs.backward is None:
                return output.clone()  # no turn tells a further forward how long this one is needed
            return output

        return run


class _Replay(torch.autograd.Function):
    """Stands for a layer in autograd. What lies elsewhere than where a graph reads it is copied there."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, turn: _Turn, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.turn = layer, turn
        _put(hidden, layer.input)
        layer.forward()
        return layer.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        layer: _Layer = ctx.layer
        assert layer.backward is not None and layer.output_gradient is not None
        _put(grads[0], layer.output_gradient)
        layer.backward()
        ctx.turn.to_come -= 1
        of_parameters = (
            found if found is None or parameter.grad is not None else found.clone()
            for parameter, found in zip(layer.parameters, layer.gradients, strict=True)
        )
        of_input = layer.input_gradient
        return None, None, None if of_input is None else of_input.detach(), *of_parameters


def _put(value: Tensor, place: Tensor) -> None:
    if value.data_ptr() != place.data_ptr():
        place.copy_(value)


class _Pass:
    """A layer's two passes as work to record, between an input and parameters that end its own graph.

    The parameters are stand-ins with the same memory: AccumulateGrad nodes of their own would belong to the
    recording's stream.
    """

    def __init__(self, layer: nn.Module, hidden: Tensor, arguments: Arguments) -> None:
        self._layer, self.hidden, self._arguments = layer, hidden, arguments
        self._parameters = {
            name: parameter.detach().requires_grad_(parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        }
        self.output: Tensor = hidden
        self.output_gradient: Tensor | None = None

    def forward(self) -> list[Tensor]:
        others, options = self._arguments
        with torch.enable_grad():
            found = functional_call(self._layer, self._parameters, (self.hidden, *others), options)
        # Megatron's layers return a pair.
        self.output = found if isinstance(found, Tensor) else found[0]
        return [self.output.detach()]

    def backward(self) -> list[Tensor | None]:
        """The gradients of the input, or None, and of the trained parameters."""
        wanted = [value for value in self._parameters.values() if value.requires_grad]
        if self.hidden.requires_grad:
            wanted.insert(0, self.hidden)
        found = torch.autograd.grad(self.output, wanted, self.output_gradient, allow_unused=True)
        return list(found) if self.hidden.requires_grad else [None, *found]


class _Rehearsal:
    """A recorder that runs the work and keeps nothing."""

    def record(self, work: Work) -> tuple[Sequence[Tensor | None], Launch]:
        return work(), lambda: None

    def lend(self, tensor: Tensor) -> Tensor:
        return tensor


def _build(
    layers: Sequence[nn.Module],
    form: _Form,
    place: Tensor,
    tensors: list[Tensor],
    inputs: LayerInputs,
    recorder: Recorder,
) -> _Stack:
    """Record the layers forward, then backward, on tensors that lie where they will always lie."""
    arguments = inputs.placed(tensors)
    hidden, needs_gradient = place, form.needs_gradient
    passes: list[_Pass] = []
    built: list[_Layer] = []
    for layer in layers:
        passes.append(_Pass(layer, hidden.detach().requires_grad_(needs_gradient), arguments))
        built.append(_record_forward(passes[-1], layer, recorder))
        hidden, needs_gradient = built[-1].output, passes[-1].output.requires_grad
    kept = (place, torch.zeros_like(hidden))
    # From here on no name may hold what a layer leaves behind: the next one is recorded over it.
    del hidden
    gradient: Tensor | None = kept[1]
    for graphs in reversed(built):
        gradient = _record_backward(passes.pop(), graphs, gradient, recorder)
    return _Stack(tensors, kept, built)


def _record_forward(both: _Pass, layer: nn.Module, recorder: Recorder) -> _Layer:
    (output,), launch = recorder.record(both.forward)
    assert output is not None
    trained = tuple(parameter for parameter in layer.parameters() if parameter.requires_grad)
    return _Layer(launch, recorder.lend(both.hidden), output, trained)


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


def _reserved_gib(device: torch.device) -> float:
    return torch.cuda.memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0
