"""Log-probabilities of given answers. A prompt is computed once for all of its answers, the head on answer tokens only."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from fitness_dpo.decoding import pad_left
from fitness_dpo.model import Policy


class Item(NamedTuple):
    prompt: list[int]
    answers: list[list[int]]


def score_all(policy: Policy, items: Sequence[Item], batch_size: int) -> Iterator[tuple[int, list[float]]]:
    """The summed log-probability, in nats, of each item's answers with the item's position, batch by batch.

    Every item has as many answers as the first; `batch_size` counts answers.
    """
    several = len(items[0].answers) if items else 1
    order = sorted(range(len(items)), key=lambda p: len(items[p].prompt) + max(map(len, items[p].answers)))
    step = max(1, batch_size // several)
    for start in range(0, len(order), step):
        positions = order[start : start + step]
        yield from zip(positions, score(policy, [items[p] for p in positions]).tolist(), strict=True)


@torch.inference_mode()
def score(policy: Policy, items: list[Item]) -> Tensor:
    """Summed log-probabilities: (items, answers).

    The prompts but for their last token fill the cache; then that token and the answers run on a copy of it each.
    """
    model, device, padding = policy.model, policy.model.device, policy.tokenizer.pad_token_id
    several = len(items[0].answers)
    cache = DynamicCache(config=model.config)
    prompts, mask = pad_left([item.prompt[:-1] for item in items], padding, device)
    model(
        input_ids=prompts, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    cache.batch_repeat_interleave(several)
    mask = mask.repeat_interleave(several, 0)
    answers = [answer for item in items for answer in item.answers]
    width = max(map(len, answers))
    heads = [[item.prompt[-1]] for item in items for _ in item.answers]
    inputs = torch.tensor(
        [(head + answer[:-1]) + [padding] * (width - len(answer)) for head, answer in zip(heads, answers, strict=True)],
        device=device,
    )
    targets = torch.tensor([answer + [padding] * (width - len(answer)) for answer in answers], device=device)
    real = torch.arange(width, device=device)[None] < torch.tensor(list(map(len, answers)), device=device)[:, None]
    logits = model(
        input_ids=inputs, attention_mask=torch.cat([mask, real.to(mask.dtype)], 1),
        position_ids=mask.sum(1, keepdim=True) + torch.arange(width, device=device), past_key_values=cache,
        use_cache=True,
    ).logits  # fmt: skip
    totals = [  # row by row: all of the batch in float32 would be gigabytes with a large vocabulary
        (row.float().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1) * held).sum()
        for row, target, held in zip(logits, targets, real, strict=True)
    ]
    return torch.stack(totals).view(len(items), several)
