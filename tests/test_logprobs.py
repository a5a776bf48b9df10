"""The torch stand-in for TRL's kernel against plain log_softmax, values and gradients."""

from functools import partial
from typing import Any

import pytest
import torch

from fitness_dpo.logprobs import CHUNK_TOKENS, ChunkedLogProbs

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # it works in float32, as TRL's kernel does
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("tokens", [0, 1, CHUNK_TOKENS, CHUNK_TOKENS + 3])
@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (5.0, 0.5, True)])
def test_values_and_gradients(tokens: int, softcap: float | None, scale: float, bias: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64)
    offset = torch.randn(11, dtype=torch.float64) if bias else None
    targets = torch.randint(11, (tokens,))

    logps, entropy, squares, mean, top = ChunkedLogProbs.apply(
        hidden, weight, offset, targets, 1.5, 0, softcap, scale, OUTPUTS
    )
    logits = torch.nn.functional.linear(hidden, weight, offset) * scale
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / 1.5
    reference: Any = torch.distributions.Categorical(logits=logits, validate_args=False)
    assert entropy is not None
    assert squares is not None
    assert mean is not None
    assert top is not None
    assert_close(logps.double(), reference.log_prob(targets))
    assert_close(entropy.double(), reference.entropy())
    assert_close(squares.double(), (reference.probs**2).sum(-1).log())
    assert_close(mean.double(), logits.mean(-1))
    assert torch.equal(top, logits.argmax(-1) == targets)

    (gradient,) = torch.autograd.grad((logps * torch.linspace(-1, 1, tokens)).sum(), hidden)
    (expected,) = torch.autograd.grad((reference.log_prob(targets) * torch.linspace(-1, 1, tokens)).sum(), hidden)
    assert_close(gradient, expected)


def test_outputs_not_asked_for_are_none() -> None:
    given = ChunkedLogProbs.apply(torch.randn(3, 4), torch.randn(5, 4), None, torch.tensor([0, 1, 2]), 1.0, 0)
    assert given[0].shape == (3,)
    assert given[1:] == (None, None, None, None)
