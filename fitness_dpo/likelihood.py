"""Log-probabilities of given answers. A prompt is computed once for all of its answers, the head on answer tokens only."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fitness_dpo.decoding import prefill
from fitness_dpo.model import Policy


class Item(NamedTuple):
    prompt: list[int]
    answers: list[list[int]]


def score_all(policy: Policy, items: Sequence[Item], batch_size: int) -> Iterator[tuple[int, list[float]]]:
    """The summed log-probability, in nats, of each item's answers with the item's position, batch by batch.

    Every item has as many answers as the first. `batch_size` is meant for answers that grow a token at a time; here all
    tokens of an answer run at once, so a quarter of it is taken.
    """
    several = len(items[0].answers) if items else 1
    order = sorted(range(len(items)), key=lambda p: len(items[p].prompt) + max(map(len, items[p].answers)))
    step = max(1, batch_size // 4 // several)
    for start in range(0, len(order), step):
        positions = order[start : start + step]
        yield from zip(positions, score(policy, [items[p] for p in positions]).tolist(), strict=True)


@torch.inference_mode()
def score(policy: Policy, items: list[Item]) -> Tensor:
    """Summed log-probabilities: (items, answers).

    The prompts but for their last token fill the cache; then that token and the answers run on a copy of it each.
    """
    device, padding = policy.model.device, policy.tokenizer.pad_token_id
    several = len(items[0].answers)
    cache, mask = prefill(policy, [item.prompt[:-1] for item in items])
    cache.batch_repeat_interleave(several)
    mask = mask.repeat_interleave(several, 0)
    asked = [(item.prompt[-1], answer) for item in items for answer in item.answers]
    width = max(len(answer) for _, answer in asked)
    inputs = torch.tensor(
        [[last, *answer[:-1]] + [padding] * (width - len(answer)) for last, answer in asked], device=device
    )
    targets = torch.tensor([answer + [padding] * (width - len(answer)) for _, answer in asked], device=device)
    real = torch.tensor([[1] * len(answer) + [0] * (width - len(answer)) for _, answer in asked], device=device)
    logits = policy.model(
        input_ids=inputs, attention_mask=torch.cat([mask, real], 1),
        position_ids=mask.sum(1, keepdim=True) + torch.arange(width, device=device), past_key_values=cache,
        use_cache=True,
    ).logits  # fmt: skip
    totals = []
    for row, target, held in zip(logits, targets, real, strict=True):  # all at once would be gigabytes in float32
        row = row.float()
        totals.append(((row.gather(-1, target[:, None]).squeeze(-1) - row.logsumexp(-1)) * held).sum())
    return torch.stack(totals).view(len(items), several)
