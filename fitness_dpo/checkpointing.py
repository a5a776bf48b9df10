"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): a layer keeps its input alone and is computed again in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Recomputed(torch.autograd.Function):
    """`layer(x)`, x: (tokens, hidden), with gradients for x and the layer's `parameters`. Until the backward pass x waits in
    `host`, if given."""

    @staticmethod
    def forward(
        ctx: Any, layer: Callable[[Tensor], Tensor], host: Tensor | None, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.layer, ctx.parameters = layer, parameters
        ctx.kept = x if host is None else host.copy_(x, non_blocking=True)
        return layer(x.detach())  # without, the compiler makes another version for the first layer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        kept, ctx.kept = ctx.kept, None
        x = kept.to(grad.device, non_blocking=True).detach().requires_grad_()
        with torch.enable_grad():
            result = ctx.layer(x)
        return None, None, *torch.autograd.grad(result, (x, *ctx.parameters), grad)


class HostRoom:
    """Page-locked memory in which layers' inputs wait. The next batch takes the same place, so each forward pass must be followed
    by its backward pass before the next one."""

    def __init__(self, layers: int, hidden: int, dtype: torch.dtype) -> None:
        self.layers, self.hidden, self.dtype = layers, hidden, dtype
        self.blocks: list[Tensor] = []

    def __call__(self, tokens: int) -> Tensor:
        """(layers, tokens, hidden). Smaller blocks stay where they are: recorded steps write to them."""
        if not self.blocks or self.blocks[-1].size(1) < tokens:
            size = 1 << (tokens - 1).bit_length()
            self.blocks.append(torch.empty(self.layers, size, self.hidden, dtype=self.dtype, pin_memory=True))
        return self.blocks[-1][:, :tokens]
