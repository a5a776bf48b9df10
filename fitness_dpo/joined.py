"""Trained parameters as one: an optimizer step, a norm and a message between GPUs are one operation instead of some hundred."""

import torch
from torch.nn import Parameter


def join(parameters: list[Parameter]) -> Parameter:
    """One parameter in 32 bits, in whose memory the given ones and their gradients lie from now on, one behind the other."""
    whole = Parameter(torch.cat([parameter.detach().float().flatten() for parameter in parameters]))
    whole.grad = torch.zeros_like(whole)
    sizes = [parameter.numel() for parameter in parameters]
    parts = zip(parameters, whole.detach().split(sizes), whole.grad.split(sizes), strict=True)
    for parameter, values, gradient in parts:
        parameter.data = values.view_as(parameter)
        parameter.grad = gradient.view_as(parameter).detach()  # no view to autograd and the compiler
    return whole
