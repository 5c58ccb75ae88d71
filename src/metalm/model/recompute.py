"""Selective recomputation: outputs that the backward pass makes again from inputs that are kept anyway.

Norms and activations cost no matrix product, but what they give is kept by the product behind them. Here that
product keeps a recipe in its place. An output is made once more when the first asks for it, and serves the
gradients of its own inputs as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recompute:
    """What is made again; entered around each layer, whose products then keep recipes, and told of ends."""

    def __init__(self) -> None:
        self._recipes: dict[int, tuple[_Recipe, Tensor]] = {}
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()

    def __exit__(self, *exception: object) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(*exception)
        self._hooks = None

    def end_layer(self, output: Tensor) -> None:
        """Forget the layer's recipes, but for its output's, which the next layer's products would keep."""
        address = output.untyped_storage().data_ptr()
        self._recipes = {key: recipe for key, recipe in self._recipes.items() if key == address}

    def end(self) -> None:
        """Forget all: no layer follows."""
        self._recipes.clear()

    def run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, a new tensor, which what comes behind does not keep."""
        if self._hooks is None or not torch.is_grad_enabled():
            return function(*inputs)
        recipe = _Recipe(function, inputs)
        output: Tensor = _MadeAgain.apply(recipe, *inputs)
        # The output is held, too, until the layer ends: its address must stay its own so long.
        self._recipes[output.untyped_storage().data_ptr()] = (recipe, output)
        return output

    def _pack(self, tensor: Tensor) -> Any:
        recipe, _ = self._recipes.get(tensor.untyped_storage().data_ptr(), (None, None))
        if recipe is None:
            return tensor
        return recipe, tensor.size(), tensor.stride(), tensor.storage_offset()


class _Recipe:
    """How an output is made, with what from."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.function = function
        self.inputs = [(value.detach(), value.requires_grad) for value in inputs]
        self._made: tuple[Tensor, list[Tensor]] | None = None

    def make(self) -> tuple[Tensor, list[Tensor]]:
        """The output with its graph, and the inputs at the graph's other end."""
        if self._made is None:
            inputs = [value.detach().requires_grad_(needs) for value, needs in self.inputs]
            # What this keeps is kept as it is: these are no products.
            with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                self._made = self.function(*inputs), inputs
        return self._made

    def forget(self) -> None:
        """Let the output go."""
        self._made = None


class _MadeAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: _Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe = recipe
        return recipe.function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        output, inputs = ctx.recipe.make()
        wanted = [value for value in inputs if value.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, grads[0]))
        ctx.recipe.forget()
        return None, *(next(found) if value.requires_grad else None for value in inputs)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, size, stride, offset = packed
    output, _ = recipe.make()
    return output.detach().as_strided(size, stride, offset)
