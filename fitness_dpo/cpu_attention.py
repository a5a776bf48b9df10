"""Attention over packed pairs on a CPU: plain batched products, a sequence at a time, so that no padding is multiplied.

At some hundred tokens a sequence they are faster than torch's fused attention.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitness_dpo.decoder import Layout, Shape
from fitness_dpo.packing import Packed

Span = tuple[slice, slice, Tensor]
"""Of one sequence: its rows of queries, its keys, and what is added to their scores: -inf where a key comes later."""


def spans(query_starts: Tensor, key_starts: Tensor, mask: Tensor, group: int) -> list[Span]:
    """Of all sequences that have queries. mask: (longest * group, before + longest), the part of it that a sequence reads ends where
    its last key may be seen."""
    found, before = [], mask.size(1) - mask.size(0) // group
    sequences = zip(pairwise(query_starts.tolist()), pairwise(key_starts.tolist()), strict=True)
    for (begin, end), (first, last) in sequences:
        rows, keys = slice(begin * group, end * group), slice(first, last)
        start = before - (last - first) + (end - begin)
        if end > begin:
            found.append((rows, keys, mask[: rows.stop - rows.start, start : start + last - first]))
    return found


class SequenceAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(width)) v, causal within each sequence. q: (tokens, heads, width), k, v: (tokens, key heads, width)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *layout: Tensor) -> Tensor:
        keys, first, second, repeats, query_starts, key_starts, mask = layout
        ctx.scale, ctx.group = q.size(2) ** -0.5, q.size(1) // k.size(1)
        ctx.spans = spans(query_starts, key_starts, mask, ctx.group)
        queries = by_key_head(q * ctx.scale, k.size(1))
        k, v = k[keys].transpose(0, 1), v[keys].transpose(0, 1)
        weights, mixed = [], []
        for rows, places, unseen in ctx.spans:
            scores = torch.baddbmm(unseen, queries[:, rows], k[:, places].mT)
            weights.append(scores.softmax(-1))
            mixed.append(weights[-1] @ v[:, places])
        ctx.save_for_backward(queries, k, v, first, second, repeats, *weights)
        return by_token(torch.cat(mixed, 1), ctx.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, k, v, first, second, repeats, *weights = ctx.saved_tensors
        grad = by_key_head(grads[0], len(k))
        into_q, into_k, into_v = [], [], []
        for (rows, places, _), weight in zip(ctx.spans, weights, strict=True):
            into_v.append(weight.mT @ grad[:, rows])
            pull = grad[:, rows] @ v[:, places].mT
            change = torch.ops.aten._softmax_backward_data(pull, weight, -1, weight.dtype)
            into_q.append(change @ k[:, places])
            into_k.append(change.mT @ queries[:, rows])
        into_keys = (gathered(torch.cat(parts, 1), first, second, repeats) for parts in (into_k, into_v))
        return by_token(torch.cat(into_q, 1).mul_(ctx.scale), ctx.group), *into_keys, *[None] * 7


def by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """(tokens, heads, width) -> (key heads, tokens * group, width)."""
    parts: Tensor = x.unflatten(1, (key_heads, -1))
    return parts.transpose(0, 1).flatten(1, 2)


def by_token(x: Tensor, group: int) -> Tensor:
    """(key heads, tokens * group, width) -> (tokens, heads, width)."""
    parts: Tensor = x.unflatten(1, (-1, group))
    return parts.transpose(0, 1).flatten(1, 2)


def gathered(into: Tensor, first: Tensor, second: Tensor, repeats: Tensor) -> Tensor:
    """Of each token, the sum of `into` (key heads, keys, width) at all places where its key stands: (tokens, key heads, width)."""
    into = F.pad(into.transpose(0, 1), (0, 0, 0, 0, 0, 1))
    total = into[first] + into[second]
    total[: repeats.size(1)] += into[repeats].sum(0)
    return total


def sequence_layout(packed: Packed, group: int, dtype: torch.dtype) -> Layout:
    """What SequenceAttention reads beside queries, keys and values of `dtype`. `group` heads share a key head."""
    queries, keys = packed.query_starts.diff(), packed.key_starts.diff()
    before, longest = int((keys - queries).max()), int(queries.max())
    mask = torch.full((longest, before + longest), float("-inf"), dtype=dtype).triu(before + 1)
    return (
        packed.keys, packed.first, packed.second, packed.repeats, packed.query_starts, packed.key_starts,
        mask.repeat_interleave(group, 0),
    )  # fmt: skip


def attend_sequences(query: Tensor, key: Tensor, value: Tensor, layout: Layout, shape: Shape) -> Tensor:
    """Causal attention within each sequence."""
    attended: Tensor = SequenceAttention.apply(query, key, value, *layout)  # type: ignore[no-untyped-call]
    return attended
