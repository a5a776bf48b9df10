"""Greedy answers to many prompts at once. Rows leave the batch as they end, so that the last few cost little."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from fitness_dpo.data import Message
from fitness_dpo.inference import end_tokens
from fitness_dpo.model import Policy
from fitness_dpo.template import ChatTemplate


class Answer(NamedTuple):
    text: str
    tokens: int
    ended: bool
    """Whether the model ended it; otherwise it was cut off at the limit."""


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
    inputs, mask = pad_left(rows, policy.tokenizer.pad_token_id, policy.model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=policy.model.config)
    going, found = list(range(len(rows))), [[] for _ in rows]  # type: tuple[list[int], list[list[int]]]
    for _ in range(max_new_tokens):
        logits = policy.model(
            input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        likeliest = logits[:, -1].argmax(-1)
        tokens = likeliest.tolist()
        for row, token in zip(going, tokens, strict=True):
            found[row].append(token)
        left = [place for place, token in enumerate(tokens) if token not in ends]
        if not left:
            break
        if len(left) < len(going):
            kept = torch.tensor(left, device=mask.device)
            cache.batch_select_indices(kept)
            mask, positions, likeliest = mask[kept], positions[kept], likeliest[kept]
            going = [going[place] for place in left]
        inputs = likeliest[:, None]
        mask = torch.cat([mask, mask.new_ones(len(going), 1)], 1)
        positions = positions[:, -1:] + 1
    return found


def pad_left(rows: list[list[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, each (rows, longest), the texts at the right end."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
