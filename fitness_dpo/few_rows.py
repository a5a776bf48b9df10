"""Layers for answering in float32 on a CPU, where a product of few rows with a wide matrix is slow, and copies are."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped"
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


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Transformers' attention, for one new token of each row without a copy of the keys and values for every head of a group.

    query: (rows, heads, tokens, width), key, value: (rows, key heads, places, width) -> (rows, tokens, heads, width).
    """
    rows, heads, tokens, width = query.shape
    plain = attention_mask is None or attention_mask.dtype == torch.bool
    if tokens > 1 or not plain or how.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    scores = (query * how["scaling"]).view(rows, key.size(1), -1, width) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return (scores.softmax(-1) @ value).view(rows, 1, heads, value.size(-1)), None


def attend_in_groups(model: Any) -> None:
    """Let a transformers model in float32 on a CPU attend by `grouped_attention`."""
    if (model.device.type, model.dtype, model.config._attn_implementation) == ("cpu", torch.float32, "sdpa"):
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.set_attn_implementation(GROUPED)


def quicken(model: Any) -> None:
    """Let the linear layers of a model in float32 on a CPU be FewRowsLinear."""
    for module in model.modules():
        if (
            type(module) is torch.nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        ):
            module.__class__ = FewRowsLinear
