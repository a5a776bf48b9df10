"""Greedy answers to many prompts at once. Rows leave the batch as they end, so that the last few cost little."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fitness_dpo.data import Message
from fitness_dpo.inference import end_tokens
from fitness_dpo.model import Policy
from fitness_dpo.template import ChatTemplate


class Answer(NamedTuple):
    text: str
    tokens: int
    ended: bool
    """Whether the model ended it; otherwise it was cut off at the limit."""


ROOM = 128
"""Tokens that a cache has room for beyond those it holds."""


class RoomyLayer(DynamicLayer):
    """A layer's cache that writes new tokens behind those it holds, where transformers' copies all of them for each new one."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = (with_room(states[:, :, :0], 0) for states in (key_states, value_states))
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = append(self.keys, key_states), append(self.values, value_states)
        return self.keys, self.values


def with_room(held: Tensor, longer: int) -> Tensor:
    """A copy of `held` (rows, heads, tokens, width) in memory with room for `longer` tokens and some more."""
    rows, heads, tokens, width = held.shape
    copy = held.new_empty(rows, heads, longer + ROOM, width)[:, :, :tokens]
    return copy.copy_(held)


def append(held: Tensor, new: Tensor) -> Tensor:
    """`new` behind `held`, in the memory of `held` where that has room for it."""
    rows, heads, tokens, width = held.shape
    longer = tokens + new.size(2)
    if held.stride(1) < longer * width:
        held = with_room(held, longer)
    whole = held.as_strided((rows, heads, longer, width), held.stride())
    whole[:, :, tokens:] = new
    return whole


def answer_all(
    policy: Policy, prompts: Sequence[list[Message]], max_new_tokens: int, batch_size: int
) -> Iterator[tuple[int, Answer]]:
    """The likeliest answer to each prompt with the prompt's position, batch by batch, prompts of like length together.

    In float32 these are the tokens that each prompt would get alone. In 16 bits a near-tie between two tokens may fall
    the other way, since sums are rounded differently in another batch.
    """
    template = ChatTemplate(policy.tokenizer)
    rows = [template.prompt_ids(prompt) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda position: len(rows[position]))
    ends = end_tokens(policy)
    for start in range(0, len(order), batch_size):
        positions = order[start : start + batch_size]
        for position, ids in zip(
            positions, decode(policy, [rows[p] for p in positions], ends, max_new_tokens), strict=True
        ):
            ended = ids[-1] in ends
            text: str = policy.tokenizer.decode(ids, skip_special_tokens=True)
            yield position, Answer(text.strip(), len(ids), ended)


@torch.inference_mode()
def decode(policy: Policy, rows: list[list[int]], ends: list[int], max_new_tokens: int) -> list[list[int]]:
    """The likeliest next tokens of each row, up to and including one of `ends`."""
    cache, mask = prefill(policy, [row[:-1] for row in rows])
    latest = torch.tensor([row[-1] for row in rows], device=mask.device)
    going, found = list(range(len(rows))), [[] for _ in rows]  # type: tuple[list[int], list[list[int]]]
    for _ in range(max_new_tokens):
        positions = mask.sum(1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        logits = policy.model(
            input_ids=latest[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True,
        ).logits  # fmt: skip
        latest = logits[:, -1].argmax(-1)
        tokens = latest.tolist()
        for row, token in zip(going, tokens, strict=True):
            found[row].append(token)
        left = [place for place, token in enumerate(tokens) if token not in ends]
        if not left:
            break
        if len(left) < len(going):
            kept = torch.tensor(left, device=mask.device)
            cache.batch_select_indices(kept)
            mask, latest = mask[kept], latest[kept]
            going = [going[place] for place in left]
    return found


def prefill(policy: Policy, rows: list[list[int]]) -> tuple[DynamicCache, Tensor]:
    """The cache that holds the rows, and the mask (rows, cached tokens) of what is real in it.

    What all rows begin with, such as a system prompt, is computed once. The rest is padded on the left, so that every row
    ends where the next token goes.
    """
    model, device = policy.model, policy.model.device
    alike = itertools.takewhile(lambda column: len({*column}) == 1, zip(*rows, strict=False))
    shared = [column[0] for column in alike]
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]  # type: ignore[no-untyped-call]
    mask = torch.ones(len(rows), len(shared), dtype=torch.long, device=device)
    if shared:
        start = torch.tensor([shared], device=device)
        model(input_ids=start, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(rows))
    rest = [row[len(shared) :] for row in rows]
    width = max(map(len, rest))
    if width:
        padding = policy.tokenizer.pad_token_id
        inputs = torch.tensor([[padding] * (width - len(row)) + row for row in rest], device=device)
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rest], device=device)
        mask = torch.cat([mask, real], 1)
        positions = (mask.cumsum(1) - 1)[:, len(shared) :].clamp(min=0)
        model(
            input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
    return cache, mask
