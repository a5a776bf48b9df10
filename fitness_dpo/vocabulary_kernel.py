"""What softmax over the vocabulary gives of each answer token, its logits read twice. Importing it wants Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 4


@triton.jit
def score_kernel(
    logits, targets, logps, entropy, means, is_top1, VOCABULARY, PULLED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row. Where PULLED, the probabilities take the logits' place."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * VOCABULARY
    peak, total, summed = float("-inf"), 0.0, 0.0
    for begin in range(0, VOCABULARY, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        scores = tl.load(start + at, mask=at < VOCABULARY, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(scores, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(scores - higher), 0)
        summed += tl.sum(tl.where(at < VOCABULARY, scores, 0.0), 0)
        peak = higher
    log_total = peak + tl.log(total)
    target = tl.load(targets + row)
    tl.store(logps + row, tl.load(start + target).to(tl.float32) - log_total)
    tl.store(means + row, summed / VOCABULARY)
    mixed, likeliest = 0.0, VOCABULARY
    for begin in range(0, VOCABULARY, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < VOCABULARY
        scores = tl.load(start + at, mask=inside, other=float("-inf")).to(tl.float32)
        probabilities = tl.exp(scores - log_total)
        mixed += tl.sum(probabilities * tl.where(inside, scores, 0.0), 0)
        likeliest = tl.minimum(likeliest, tl.min(tl.where(scores == peak, at, VOCABULARY), 0))
        if PULLED:
            tl.store(start + at, probabilities.to(logits.dtype.element_ty), mask=inside)
    tl.store(entropy + row, log_total - mixed)
    tl.store(is_top1 + row, likeliest == target)


def score_chunk_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, pulled: bool) -> tuple[Tensor, ...]:
    """What `logprobs.score_chunk` gives."""
    logits = hidden @ weight.T
    logps, entropy, means = (logits.new_empty(len(targets), dtype=torch.float32) for _ in range(3))
    is_top1 = torch.empty_like(targets, dtype=torch.bool)
    score_kernel[(len(targets),)](
        logits, targets, logps, entropy, means, is_top1, logits.size(1), PULLED=pulled, BLOCK=BLOCK, num_warps=WARPS
    )
    scores = logps, entropy, means, is_top1
    return (*scores, torch.addmm(weight[targets], logits, weight, alpha=-1)) if pulled else scores
