"""Log-probabilities of tokens, a chunk of logits at a time.

`answer_logps` serves the packed forward. `ChunkedLogProbs` fills the slot where TRL 1.15 has a kernel that only runs on a GPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import trl.trainer.utils
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 512
Score = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, ...]]
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, ...]:
    logits = (
        torch.nn.functional.linear(
            hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        ).float()
        * scale
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logps = logits.log_softmax(-1)
    probabilities = logps.exp()
    return (
        logps.gather(-1, targets[:, None]).squeeze(-1),
        -(probabilities * logps).sum(-1),
        torch.logsumexp(2 * logps, -1).detach(),
        logits.mean(-1).detach(),
        logits.argmax(-1) == targets,
    )


class ChunkedLogProbs:
    """Stands in for trl.kernels.ChunkedLogProbFunction: the same call, the same five outputs.

    hidden: (tokens, width), weight: (vocabulary, width), targets: (tokens,) -> log-probabilities in nats, entropy in nats,
    log of the sum of squared probabilities, mean logit, whether the target is the likeliest token; each (tokens,). No more
    than CHUNK_TOKENS x vocabulary logits are held at once: each chunk is computed again in the backward pass.
    """

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = (),
    ) -> Outputs:  # fmt: skip
        chunks = [
            checkpoint(
                _chunk, hidden[start : start + CHUNK_TOKENS], weight, bias, targets[start : start + CHUNK_TOKENS],
                temperature, final_logit_softcapping, logit_scale, use_reentrant=False,
            )
            for start in range(0, max(len(hidden), 1), CHUNK_TOKENS)
        ]  # fmt: skip
        logps, *rest = (torch.cat(values) for values in zip(*chunks, strict=True))
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        entropy, squares, mean, top = (
            value if name in outputs else None for name, value in zip(names, rest, strict=True)
        )
        return logps, entropy, squares, mean, top


def fill_trl_slot() -> None:
    """Let TRL compute its log-probabilities with ChunkedLogProbs, where its own kernel cannot run."""
    trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbs


class TokenScores(NamedTuple):
    """Of each answer token, (tokens,) each, in nats where that is a unit."""

    logps: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


CHUNK_LOGITS = 1 << 27
"""Logits held at once: 268 MB in 16 bits."""


def score_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, pulled: bool) -> tuple[Tensor, ...]:
    """The scores of one chunk; where `pulled`, d logps / d hidden too: (tokens, width), the target's row of W less the expected."""
    logits = (hidden @ weight.T).float()
    own = logits.gather(-1, targets[:, None])
    peak, likeliest = logits.max(-1, keepdim=True)
    mean_logits = logits.mean(-1)
    logits -= peak
    powers = logits.exp()
    total = powers.sum(-1, keepdim=True)
    entropy = total.log() - logits.mul_(powers).sum(-1, keepdim=True) / total
    scores = (
        (own - (peak + total.log())).squeeze(-1),
        entropy.squeeze(-1),
        mean_logits,
        likeliest.squeeze(-1) == targets,
    )
    return (*scores, weight[targets] - powers.div_(total).to(weight.dtype) @ weight) if pulled else scores


class AnswerLogProbs(torch.autograd.Function):
    """log softmax(hidden W^T) at the targets, with its gradient made in the forward pass while the logits are at hand.

    A token's log-probability pulls on its own hidden state alone, so the backward pass only scales what was kept:
    two products with W instead of three.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, score: Score) -> tuple[Tensor, ...]:
        chunk = max(CHUNK_LOGITS // weight.size(0), 1) if hidden.is_cuda else CHUNK_TOKENS
        pulled = ctx.needs_input_grad[0]
        parts = [
            score(hidden[start : start + chunk], weight, targets[start : start + chunk], pulled)
            for start in range(0, len(hidden), chunk)
        ]
        scores = [torch.cat(values) for values in zip(*parts, strict=True)]
        if pulled:
            ctx.save_for_backward(scores.pop())
        ctx.mark_non_differentiable(*scores[1:])
        return tuple(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return grads[0][:, None].to(direction.dtype) * direction, None, None, None


def answer_logps(hidden: Tensor, weight: Tensor, targets: Tensor, score: Score = score_chunk) -> TokenScores:
    """Scores of `targets` (tokens,) under softmax(hidden W^T). hidden: (tokens, width), W: (vocabulary, width), frozen."""
    scores = AnswerLogProbs.apply(hidden, weight, targets, score)  # type: ignore[no-untyped-call]
    return TokenScores(*scores)
