"""Attention over packed pairs in kernels of its own: sequences of some hundred tokens, whose keys are read where they lie.

FlashAttention-2 (Dao 2023) with three changes that pay at such lengths: a prompt's keys are looked up by both of its answers
instead of being copied, the query heads that share a key head are rows of one tile, and tiles are counted by sequence, so
that few are empty. Importing it wants Triton, which a CUDA build of torch brings.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fitness_dpo.decoder import Layer, Layout, Shape
from fitness_dpo.packing import Packed
from fitness_dpo.rotary_kernels import into_qkv_kernel, of_rows, rotate_kernel

LOG2_E = tl.constexpr(1.4426950408889634)


class Sizes(NamedTuple):
    """Of one kernel: queries times their group of heads, and keys, that a program holds at once."""

    rows: int
    keys: int
    warps: int
    stages: int


FORWARD, INTO_QUERIES, INTO_KEYS = Sizes(64, 32, 4, 3), Sizes(64, 32, 4, 3), Sizes(32, 64, 4, 3)


@triton.jit
def tile_of(starts, tile_sequences, tile_numbers):
    """The sequence of this program, the number of its tile in it, and where the sequence starts and how long it is."""
    sequence = tl.load(tile_sequences + tl.program_id(0))
    start = tl.load(starts + sequence)
    return sequence, tl.load(tile_numbers + tl.program_id(0)), start, tl.load(starts + sequence + 1) - start


@triton.jit
def rows_of(tile, start, length, head, ROWS: tl.constexpr, GROUP: tl.constexpr, KEY_HEADS: tl.constexpr):
    """Of each row of a tile: its query's place in the sequence, whether it is one, and its place in (tokens * heads)."""
    row = tl.arange(0, ROWS)
    query = tile * (ROWS // GROUP) + row // GROUP
    inside = (row // GROUP < ROWS // GROUP) & (query < length)
    return query, inside, ((start + query) * KEY_HEADS + head) * GROUP + row % GROUP


@triton.jit
def keys_of(k, v, keys, place, there, head, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, V_STRIDE: tl.constexpr):
    """One head's keys and values at these places of `keys`; zeros where there is none."""
    token = tl.load(keys + place, mask=there, other=0)
    wide = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    key = tl.load(k + token[:, None] * (KEY_HEADS * WIDTH) + wide, mask=there[:, None], other=0.0)
    return key, tl.load(v + token[:, None] * V_STRIDE + wide, mask=there[:, None], other=0.0)


@triton.jit(do_not_specialize=["SEQUENCES"])
def forward_kernel(
    q, k, v, out, log_totals, keys, query_starts, key_starts, tile_sequences, tile_numbers, SEQUENCES,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    V_STRIDE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    if tl.load(tile_sequences + tl.program_id(0)) < SEQUENCES:
        sequence, tile, start, length = tile_of(query_starts, tile_sequences, tile_numbers)
        key_start = tl.load(key_starts + sequence)
        key_length = tl.load(key_starts + sequence + 1) - key_start
        query, inside, row = rows_of(tile, start, length, head, ROWS, GROUP, KEY_HEADS)
        last = query + key_length - length
        wide = tl.arange(0, WIDTH)
        queries = tl.load(q + row[:, None] * WIDTH + wide[None, :], mask=inside[:, None], other=0.0)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, WIDTH], tl.float32)
        end = tl.minimum((tile + 1) * (ROWS // GROUP) + key_length - length, key_length)
        for begin in range(0, end, KEYS):
            place = begin + tl.arange(0, KEYS)
            there = place < key_length
            key, value = keys_of(k, v, keys + key_start, place, there, head, KEY_HEADS, WIDTH, V_STRIDE)
            scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION) * (SCALE * LOG2_E)
            scores = tl.where(place[None, :] <= last[:, None], scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
            peak = higher
        at = row[:, None] * WIDTH + wide[None, :]
        tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
        tl.store(log_totals + row, peak + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["SEQUENCES"])
def into_queries_kernel(
    q, k, v, out, grad, log_totals, pulls, into_q, keys, query_starts, key_starts, tile_sequences, tile_numbers, SEQUENCES,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    V_STRIDE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    if tl.load(tile_sequences + tl.program_id(0)) < SEQUENCES:
        sequence, tile, start, length = tile_of(query_starts, tile_sequences, tile_numbers)
        key_start = tl.load(key_starts + sequence)
        key_length = tl.load(key_starts + sequence + 1) - key_start
        query, inside, row = rows_of(tile, start, length, head, ROWS, GROUP, KEY_HEADS)
        last = query + key_length - length
        wide = tl.arange(0, WIDTH)
        at_rows = row[:, None] * WIDTH + wide[None, :]
        queries = tl.load(q + at_rows, mask=inside[:, None], other=0.0)
        grads = tl.load(grad + at_rows, mask=inside[:, None], other=0.0)
        log_total = tl.load(log_totals + row, mask=inside, other=0.0)
        mixed = tl.load(out + at_rows, mask=inside[:, None], other=0.0)
        pull = tl.sum(grads.to(tl.float32) * mixed.to(tl.float32), 1)
        tl.store(pulls + row, pull, mask=inside)
        into = tl.zeros([ROWS, WIDTH], tl.float32)
        end = tl.minimum((tile + 1) * (ROWS // GROUP) + key_length - length, key_length)
        for begin in range(0, end, KEYS):
            place = begin + tl.arange(0, KEYS)
            there = place < key_length
            key, value = keys_of(k, v, keys + key_start, place, there, head, KEY_HEADS, WIDTH, V_STRIDE)
            scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION) * (SCALE * LOG2_E)
            weights = tl.where(place[None, :] <= last[:, None], tl.exp2(scores - log_total[:, None]), 0.0)
            change = weights * (tl.dot(grads, tl.trans(value), input_precision=PRECISION) - pull[:, None])
            into += tl.dot(change.to(key.dtype), key, input_precision=PRECISION)
        tl.store(into_q + at_rows, (into * SCALE).to(into_q.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["SEQUENCES"])
def into_keys_kernel(
    q, k, v, grad, log_totals, pulls, into_k, into_v, keys, query_starts, key_starts, tile_sequences, tile_numbers, SEQUENCES,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    V_STRIDE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    if tl.load(tile_sequences + tl.program_id(0)) < SEQUENCES:
        sequence, tile, key_start, key_length = tile_of(key_starts, tile_sequences, tile_numbers)
        start = tl.load(query_starts + sequence)
        length = tl.load(query_starts + sequence + 1) - start
        wide = tl.arange(0, WIDTH)
        place = tile * KEYS + tl.arange(0, KEYS)
        there = place < key_length
        key, value = keys_of(k, v, keys + key_start, place, there, head, KEY_HEADS, WIDTH, V_STRIDE)
        key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
        value_sum = tl.zeros([KEYS, WIDTH], tl.float32)
        first = tl.maximum(tile * KEYS - (key_length - length), 0) // (ROWS // GROUP)
        for number in range(first, tl.cdiv(length, ROWS // GROUP)):
            query, inside, row = rows_of(number, start, length, head, ROWS, GROUP, KEY_HEADS)
            at_rows = row[:, None] * WIDTH + wide[None, :]
            queries = tl.load(q + at_rows, mask=inside[:, None], other=0.0)
            grads = tl.load(grad + at_rows, mask=inside[:, None], other=0.0)
            log_total = tl.load(log_totals + row, mask=inside, other=0.0)
            pull = tl.load(pulls + row, mask=inside, other=0.0)
            seen = (place[:, None] <= (query + key_length - length)[None, :]) & inside[None, :]
            scores = tl.dot(key, tl.trans(queries), input_precision=PRECISION) * (SCALE * LOG2_E)
            weights = tl.where(seen, tl.exp2(scores - log_total[None, :]), 0.0)
            value_sum += tl.dot(weights.to(grads.dtype), grads, input_precision=PRECISION)
            change = weights * (tl.dot(value, tl.trans(grads), input_precision=PRECISION) - pull[None, :])
            key_sum += tl.dot(change.to(queries.dtype), queries, input_precision=PRECISION)
        at = ((key_start + place) * KEY_HEADS + head)[:, None] * WIDTH + wide[None, :]
        tl.store(into_k + at, (key_sum * SCALE).to(into_k.dtype.element_ty), mask=there[:, None])
        tl.store(into_v + at, value_sum.to(into_v.dtype.element_ty), mask=there[:, None])


class PackedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(width)) v, causal within each sequence, q and k rotated and, with norms, normed before: what
    decoder.split_heads and torch's attention give, from qkv (tokens, (heads + 2 key heads) * width) with gradients for it alone."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, shape: Shape, *layout: Tensor
    ) -> Tensor:  # fmt: skip
        keys, _, _, _, query_starts, key_starts, sequences, numbers, *_ = layout
        q = qkv.new_empty(len(qkv), shape.heads, shape.head_width)
        k = qkv.new_empty(len(qkv), shape.key_heads, shape.head_width)
        v = qkv[:, (shape.heads + shape.key_heads) * shape.head_width :]
        rotate_kernel[(len(qkv),)](qkv, cos, sin, q_norm, k_norm, q, k, **of_rows(shape, q_norm))
        out, log_totals = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        forward_kernel[(len(sequences), shape.key_heads)](
            q, k, v, out, log_totals, keys, query_starts, key_starts, sequences, numbers, len(query_starts) - 1,
            **of_tiles(shape, q.dtype, FORWARD),
        )  # fmt: skip
        ctx.shape, ctx.norms = shape, (q_norm, k_norm)
        ctx.save_for_backward(qkv, cos, sin, q, k, out, log_totals, *layout)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, q, k, out, log_totals, *layout = ctx.saved_tensors
        keys, first, second, repeats, query_starts, key_starts, sequences, numbers, key_sequences, key_numbers = layout
        shape, grad, count = ctx.shape, grads[0].contiguous(), len(query_starts) - 1
        v = qkv[:, (shape.heads + shape.key_heads) * shape.head_width :]
        into_q, pulls, into_qkv = torch.empty_like(q), torch.empty_like(log_totals), torch.empty_like(qkv)
        into_k, into_v = (k.new_empty((len(keys), *k.shape[1:])) for _ in range(2))
        into_queries_kernel[(len(sequences), shape.key_heads)](
            q, k, v, out, grad, log_totals, pulls, into_q, keys, query_starts, key_starts, sequences, numbers, count,
            **of_tiles(shape, q.dtype, INTO_QUERIES),
        )  # fmt: skip
        into_keys_kernel[(len(key_sequences), shape.key_heads)](
            q, k, v, grad, log_totals, pulls, into_k, into_v, keys, query_starts, key_starts, key_sequences, key_numbers, count,
            **of_tiles(shape, q.dtype, INTO_KEYS),
        )  # fmt: skip
        into_qkv_kernel[(len(qkv),)](
            qkv, cos, sin, *ctx.norms, into_q, into_k, into_v, into_qkv, first, second, repeats, len(keys), len(repeats),
            PREFIX=repeats.size(1), **of_rows(shape, ctx.norms[0]),
        )  # fmt: skip
        return into_qkv, *[None] * (5 + len(layout))


def of_tiles(shape: Shape, dtype: torch.dtype, sizes: Sizes) -> dict[str, Any]:
    """Constants of a kernel whose programs hold tiles of queries and keys."""
    group, width = shape.heads // shape.key_heads, shape.head_width
    return {
        "KEY_HEADS": shape.key_heads, "GROUP": group, "WIDTH": width, "V_STRIDE": (shape.heads + 2 * shape.key_heads) * width,
        "ROWS": sizes.rows, "KEYS": sizes.keys, "SCALE": width**-0.5, "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": sizes.warps, "num_stages": sizes.stages,
    }  # fmt: skip


def kernel_layout(packed: Packed, group: int) -> Layout:
    """What the kernels read: the pairs' keys and where each sequence starts, and which part of which sequence a program takes.
    `group` heads share a key head."""
    queries = tiles(packed.query_starts, FORWARD.rows // group, len(packed.ids))
    keys = tiles(packed.key_starts, INTO_KEYS.keys, len(packed.keys))
    return (
        packed.keys.int(), packed.first, packed.second, packed.repeats, packed.query_starts, packed.key_starts, *queries, *keys,
    )  # fmt: skip


def tiles(starts: Tensor, size: int, places: int) -> tuple[Tensor, Tensor]:
    """The sequence of each tile of `size` places, and its number in the sequence. The number of sequences where there is none."""
    counts = (starts.diff() + size - 1) // size
    ends = counts.cumsum(0)
    tile = torch.arange(places // size + len(counts), device=starts.device)
    sequence = torch.searchsorted(ends, tile, right=True)
    begins = torch.cat([ends - counts, ends[-1:]])
    return sequence.int(), (tile - begins[sequence]).int()


def attend_kernel(qkv: Tensor, cos: Tensor, sin: Tensor, layer: Layer, layout: Layout, shape: Shape) -> Tensor:
    """Causal attention within each sequence."""
    attended: Tensor = PackedAttention.apply(qkv, cos, sin, layer.query_norm, layer.key_norm, shape, *layout)  # type: ignore[no-untyped-call]
    return attended
