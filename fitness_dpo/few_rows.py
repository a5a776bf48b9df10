"""Linear layers for answering in float32 on a CPU, where a product of few rows with a wide matrix is slow."""

from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 64
"""With more, turning the product back costs what it wins."""


class FewRowsLinear(torch.nn.Linear):
    """x W^T as (W x^T)^T: x: (..., inputs) -> (..., outputs). The library's kernels split W's rows among the cores, not x's."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        if not 1 < rows <= MOST_ROWS or torch.is_grad_enabled() or self.weight.dtype != torch.float32:
            return super().forward(x)
        product = (self.weight @ x.reshape(rows, -1).T).T.contiguous()
        return (product if self.bias is None else product + self.bias).view(*x.shape[:-1], -1)


def quicken(model: Any) -> None:
    """Let the linear layers of a model in float32 on a CPU be FewRowsLinear."""
    for module in model.modules():
        if (
            type(module) is torch.nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        ):
            module.__class__ = FewRowsLinear
