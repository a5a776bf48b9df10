"""What stands around attention, in kernels: the norms of queries and keys (Qwen3) and the rotary embedding, one pass over a token's
row before it and one for the gradient after it. Importing it wants Triton."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fitness_dpo.decoder import Shape


@triton.jit
def halves(row, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The left and the right half of the heads that lie at `row`, in 32 bits: (BLOCK, WIDTH / 2) each, zeros where none is."""
    at = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH // 2)[None, :]
    left = tl.load(row + at, mask=there[:, None], other=0.0).to(tl.float32)
    return left, tl.load(row + at + WIDTH // 2, mask=there[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_halves(row, there, left, right, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * WIDTH + tl.arange(0, WIDTH // 2)[None, :]
    tl.store(row + at, left.to(row.dtype.element_ty), mask=there[:, None])
    tl.store(row + at + WIDTH // 2, right.to(row.dtype.element_ty), mask=there[:, None])


@triton.jit
def half_row(row, WIDTH: tl.constexpr):
    """(1, WIDTH / 2)"""
    return tl.load(row + tl.arange(0, WIDTH // 2)).to(tl.float32)[None, :]


@triton.jit
def rotate_heads(row, out, norm, cos, sin, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr):  # fmt: skip
    """Of COUNT heads of a token: the norm, unless EPSILON is None, and the rotary embedding."""
    there = tl.arange(0, BLOCK) < COUNT
    left, right = halves(row, there, WIDTH, BLOCK)
    if EPSILON is not None:
        scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / WIDTH + EPSILON)[:, None]
        left *= scale * half_row(norm, WIDTH)
        right *= scale * half_row(norm + WIDTH // 2, WIDTH)
    store_halves(out, there, left * cos - right * sin, right * cos + left * sin, WIDTH, BLOCK)


@triton.jit
def into_heads(row, into, norm, cos, sin, left, right, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr):  # fmt: skip
    """The gradient of what `rotate_heads` reads, from that of what it writes, in halves."""
    there = tl.arange(0, BLOCK) < COUNT
    into_left, into_right = left * cos + right * sin, right * cos - left * sin
    if EPSILON is not None:
        into_left *= half_row(norm, WIDTH)
        into_right *= half_row(norm + WIDTH // 2, WIDTH)
        left, right = halves(row, there, WIDTH, BLOCK)
        square = (tl.sum(left * left, 1) + tl.sum(right * right, 1)) / WIDTH + EPSILON
        along = ((tl.sum(into_left * left, 1) + tl.sum(into_right * right, 1)) / WIDTH / square)[:, None]
        scale = tl.rsqrt(square)[:, None]
        into_left, into_right = scale * (into_left - along * left), scale * (into_right - along * right)
    store_halves(into, there, into_left, into_right, WIDTH, BLOCK)


@triton.jit
def rotate_kernel(
    qkv, cos, sin, q_norm, k_norm, q, k,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
):  # fmt: skip
    """One token's queries and keys."""
    token = tl.program_id(0).to(tl.int64)
    row = qkv + token * (HEADS + 2 * KEY_HEADS) * WIDTH
    c, s = half_row(cos + token * WIDTH, WIDTH), half_row(sin + token * WIDTH, WIDTH)
    rotate_heads(row, q + token * HEADS * WIDTH, q_norm, c, s, HEADS, WIDTH, BLOCK, EPSILON)
    row += HEADS * WIDTH
    rotate_heads(row, k + token * KEY_HEADS * WIDTH, k_norm, c, s, KEY_HEADS, WIDTH, KEY_BLOCK, EPSILON)


@triton.jit(do_not_specialize=["places", "times"])
def into_qkv_kernel(
    qkv, cos, sin, q_norm, k_norm, into_q, into_k, into_v, into_qkv, first, second, repeats, places, times, PREFIX: tl.constexpr,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    EPSILON: tl.constexpr,
):  # fmt: skip
    """The gradient of one token's row; that of its key and value is the sum over all places where they stand."""
    token = tl.program_id(0).to(tl.int64)
    row = token * (HEADS + 2 * KEY_HEADS) * WIDTH
    c, s = half_row(cos + token * WIDTH, WIDTH), half_row(sin + token * WIDTH, WIDTH)
    left, right = halves(into_q + token * HEADS * WIDTH, tl.arange(0, BLOCK) < HEADS, WIDTH, BLOCK)
    into_heads(qkv + row, into_qkv + row, q_norm, c, s, left, right, HEADS, WIDTH, BLOCK, EPSILON)
    there = tl.arange(0, KEY_BLOCK) < KEY_HEADS
    at = tl.load(first + token) * KEY_HEADS * WIDTH
    left, right = halves(into_k + at, there, WIDTH, KEY_BLOCK)
    value_left, value_right = halves(into_v + at, there, WIDTH, KEY_BLOCK)
    place = tl.load(second + token)
    twice = tl.arange(0, KEY_BLOCK) < tl.where(place < places, KEY_HEADS, 0)
    more_left, more_right = halves(into_k + place * KEY_HEADS * WIDTH, twice, WIDTH, KEY_BLOCK)
    left, right = left + more_left, right + more_right
    more_left, more_right = halves(into_v + place * KEY_HEADS * WIDTH, twice, WIDTH, KEY_BLOCK)
    value_left, value_right = value_left + more_left, value_right + more_right
    if token < PREFIX:
        for time in range(times):
            at = tl.load(repeats + time * PREFIX + token) * KEY_HEADS * WIDTH
            more_left, more_right = halves(into_k + at, there, WIDTH, KEY_BLOCK)
            left, right = left + more_left, right + more_right
            more_left, more_right = halves(into_v + at, there, WIDTH, KEY_BLOCK)
            value_left, value_right = value_left + more_left, value_right + more_right
    row += HEADS * WIDTH
    into_heads(qkv + row, into_qkv + row, k_norm, c, s, left, right, KEY_HEADS, WIDTH, KEY_BLOCK, EPSILON)
    store_halves(into_qkv + row + KEY_HEADS * WIDTH, there, value_left, value_right, WIDTH, KEY_BLOCK)


def of_rows(shape: Shape, norm: Tensor | None) -> dict[str, Any]:
    """Constants of a kernel whose programs hold one token's row."""
    return {
        "HEADS": shape.heads, "KEY_HEADS": shape.key_heads, "BLOCK": triton.next_power_of_2(shape.heads),
        "KEY_BLOCK": triton.next_power_of_2(shape.key_heads), "WIDTH": shape.head_width,
        "EPSILON": None if norm is None else shape.norm_epsilon,
    }  # fmt: skip
