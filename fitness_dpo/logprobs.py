"""Per-token log-probabilities in plain torch, for the slot where TRL 1.15 has a kernel that only runs on a GPU."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256
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
