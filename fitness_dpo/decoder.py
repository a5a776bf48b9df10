"""The forward pass of a Llama-like decoder over packed pairs: matrix products see no padding and no prompt twice.

It reads the weights of a model that PEFT wraps and leaves the model as it is, so it serves any backend that loads one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fitness_dpo.packing import Packed

Layout = tuple[Tensor, ...]
Attend = Callable[[Tensor, Tensor, Tensor, "Layer", Layout, "Shape"], Tensor]
"""`before_attention`'s product, cos and sin -> causal attention within each sequence, (tokens, heads, width)."""


class Adapted(NamedTuple):
    """Linear layers with one input, as one product: (outputs, inputs) weights stacked, and their LoRA factors."""

    weights: list[Tensor]
    bias: Tensor | None
    a: list[Tensor]
    """(r, inputs) each."""
    b: list[Tensor]
    """(outputs, r) each."""
    rows: list[int]
    """The first output of each adapted layer."""
    scales: list[float]

    def apart(self) -> "Adapted":
        """The same weights, with factors that are parameters of their own in the same memory."""

        def own(factor: Tensor) -> Tensor:
            return torch.nn.Parameter(factor.detach())

        return self._replace(a=[*map(own, self.a)], b=[*map(own, self.b)])


class Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Adapted
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Adapted
    mlp_norm: Tensor
    gate_up: Adapted
    down: Adapted

    def factors(self) -> list[Tensor]:
        """LoRA's, the parameters that are trained."""
        parts = (self.qkv, self.output, self.gate_up, self.down)
        return [factor for part in parts for factor in (*part.a, *part.b)]

    def each(self, change: Callable[[Adapted], Adapted]) -> "Layer":
        return self._replace(
            qkv=change(self.qkv), output=change(self.output), gate_up=change(self.gate_up), down=change(self.down)
        )


class Shape(NamedTuple):
    heads: int
    key_heads: int
    head_width: int
    norm_epsilon: float


class LoraProduct(torch.autograd.Function):
    """x W^T + (x A^T) B^T (Hu et al. 2021, eq. 3). x: (tokens, inputs), w: (outputs, inputs), a: (r, inputs), b: (outputs, r) ->
    (tokens, outputs). W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = x @ a.T
        ctx.save_for_backward(x, w, a, b, low)
        return (x @ w.T).addmm_(low, b.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        (grad,) = grads
        x, w, a, b, low = ctx.saved_tensors
        into_low = grad @ b
        return (grad @ w).addmm_(into_low, a), None, into_low.T @ x, grad.T @ low


class WideLoraProduct(torch.autograd.Function):
    """The same as one matrix product, [x, x A^T] [W, B]^T, whose sum is kept in 32 bits: a GPU would read and write the outputs
    once more for a second product. Its gradient is one too, over what is narrower: the gradient of the outputs beside that of
    x A^T, or both results side by side.

    [x, 0] is what other operations write x into, and x A^T takes the zeros' place. Both matrices stay whole here, zeros and
    what is not wanted included, since the compiler copies x for a product with a part of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        both = F.pad(x, (0, len(a)))
        both[:, x.size(1) :] = both @ F.pad(a, (0, len(a))).T
        ctx.save_for_backward(both, w, a, b)
        return both @ torch.cat([w, b], 1).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        (grad,) = grads
        both, w, a, b = ctx.saved_tensors
        outputs, inputs = w.shape
        if outputs > inputs:
            wide = grad @ torch.cat([w, b], 1)
            into_low = wide[:, inputs:]
            into_x = wide[:, :inputs] + into_low @ a
        else:
            into_low = grad @ b
            into_x = torch.cat([grad, into_low], 1) @ torch.cat([w, a])
        return into_x, None, (into_low.T @ both)[:, :inputs], grad.T @ both[:, inputs:]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich 2019, eq. 4), computed in 32 bits as transformers does."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34), halves as in Llama. x: (tokens, heads, width)."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def row_layout(packed: Packed) -> Layout:
    """A row a pair: (pairs, width) the token at each place; (tokens,) the flat place of each token; and
    (pairs, width, width) what a place may look at: nothing later, and no chosen answer from a rejected one."""
    lengths, prefix = packed.lengths, packed.repeats.size(1)
    totals = lengths.sum(1, keepdim=True)
    width = int(totals.max())
    place = torch.arange(width, device=lengths.device)
    starts = (totals - prefix).cumsum(0) - totals
    rows = torch.where(place < prefix, place, prefix + starts + torch.minimum(place, totals - 1))
    own = (place < totals) & (place >= prefix)
    own[0, :prefix] = True
    flat = own.flatten().nonzero().squeeze(1)
    answers = lengths[:, :2].sum(1, keepdim=True)
    chosen, rejected = (place >= lengths[:, :1]) & (place < answers), place >= answers
    seen = (place[None, :] <= place[:, None]) & ~(rejected[:, :, None] & chosen[:, None, :])
    return rows, flat, seen


def attend_split(
    split: Callable[..., tuple[Tensor, Tensor, Tensor]], attend: Callable[..., Tensor],
    qkv: Tensor, cos: Tensor, sin: Tensor, layer: "Layer", layout: Layout, shape: Shape,
) -> Tensor:  # fmt: skip
    """Attend, by `split_heads` and one of torch's ways on what it gives."""
    return attend(*split(qkv, cos, sin, layer, shape), layout, shape)


def attend_rows(query: Tensor, key: Tensor, value: Tensor, layout: Layout, shape: Shape) -> Tensor:
    """Causal attention within each sequence by torch's own, a row a pair."""
    rows, flat, seen = layout
    q, k, v = (part[rows].transpose(1, 2) for part in (query, key, value))
    k, v = (part.repeat_interleave(shape.heads // shape.key_heads, 1) for part in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
    return mixed.transpose(1, 2).flatten(0, 1)[flat]


def before_attention(x: Tensor, layer: Layer, shape: Shape) -> Tensor:
    """x: (tokens, hidden) -> queries, keys and values of one layer side by side, (tokens, (heads + 2 key heads) * width)."""
    return product(rms_norm(x, layer.attention_norm, shape.norm_epsilon), layer.qkv)


def split_heads(qkv: Tensor, cos: Tensor, sin: Tensor, layer: Layer, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """`before_attention`'s product -> queries (tokens, heads, width), keys and values (tokens, key heads, width), rotated."""
    widths = [shape.heads * shape.head_width, *[shape.key_heads * shape.head_width] * 2]
    query, key, value = (part.unflatten(-1, (-1, shape.head_width)) for part in qkv.split(widths, -1))
    if layer.query_norm is not None and layer.key_norm is not None:
        query = rms_norm(query, layer.query_norm, shape.norm_epsilon)
        key = rms_norm(key, layer.key_norm, shape.norm_epsilon)
    return rotate(query, cos, sin), rotate(key, cos, sin), value.contiguous()


def after_attention(x: Tensor, attended: Tensor, layer: Layer, shape: Shape) -> Tensor:
    """x: (tokens, hidden), attended: (tokens, heads, width) -> (tokens, hidden), what the next layer takes."""
    x = x + product(attended.flatten(-2), layer.output)
    gate, up = product(rms_norm(x, layer.mlp_norm, shape.norm_epsilon), layer.gate_up).chunk(2, -1)
    return x + product(F.silu(gate) * up, layer.down)


def product(x: Tensor, layer: Adapted) -> Tensor:
    """Layers that share the input x: (tokens, inputs) -> (tokens, their outputs side by side)."""
    weight = layer.weights[0] if len(layer.weights) == 1 else torch.cat(layer.weights)
    if not layer.a:
        return F.linear(x, weight, layer.bias)
    outputs = weight.size(0)
    factors = [
        F.pad((b * scale).to(x.dtype), (0, 0, row, outputs - row - b.size(0)))
        for b, row, scale in zip(layer.b, layer.rows, layer.scales, strict=True)
    ]
    function = WideLoraProduct if x.is_cuda else LoraProduct
    result: Tensor = function.apply(  # type: ignore[no-untyped-call]
        x, weight, torch.cat(layer.a).to(x.dtype), torch.cat(factors, 1)
    )
    return result if layer.bias is None else result + layer.bias
