"""Parameters that share one memory against the same parameters apart."""

import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from fitness_dpo.joined import join


def test_clipped_steps_on_joined_parameters_are_those_on_each() -> None:
    torch.manual_seed(0)
    apart = [Parameter(torch.randn(size)) for size in ((3, 4), (5,), (2, 1))]
    given = [Parameter(parameter.detach().clone()) for parameter in apart]
    whole = join(given)
    pulls = [torch.randn_like(parameter) for parameter in apart]
    for trained, parameters in (([whole], given), (apart, apart)):
        optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            for pull, parameter in zip(pulls, parameters, strict=True):
                (pull * parameter.square()).sum().backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
    for mine, theirs in zip(given, apart, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert whole.detach().equal(torch.cat([parameter.detach().flatten() for parameter in given]))


def test_joined_parameters_are_in_32_bits() -> None:
    half = Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    whole = join([half])
    whole.data.mul_(1.001)
    assert half.dtype == torch.float32
    assert half.tolist() == [[whole[0].item()] * 2] * 2
