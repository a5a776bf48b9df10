"""CUDA graphs of a forward and a backward pass: the GPU repeats a recorded step without waiting for Python's launches."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fitness_dpo.logprobs import TokenScores
from fitness_dpo.packing import Packed

LARGEST_TOKENS = 16_384
"""Larger batches keep the GPU busy for longer than their launches take."""


class Recording(NamedTuple):
    inputs: Packed
    scores: TokenScores
    pull: Tensor
    """Gradient of the loss with respect to scores.logps, which the backward pass starts from."""
    gradients: Tensor
    """Those of all parameters, one behind the other; the same place for all recordings."""
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Recorder:
    """Computes `compute(packed)` with gradients for `parameters`, from a recording where the batch's shape was seen before.

    A shape is recorded when it comes a second time. All recordings share one pool of memory, so each replay
    of a forward pass must be followed by its backward pass before the next one.
    """

    def __init__(self, compute: Callable[[Packed], TokenScores], parameters: list[Tensor]) -> None:
        self.compute, self.parameters = compute, parameters
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: Counter[tuple[torch.Size, ...]] = Counter()
        self.recordings: dict[tuple[torch.Size, ...], Recording] = {}
        self.gradients = torch.cat([parameter.detach().flatten() for parameter in parameters])

    def __call__(self, packed: Packed) -> TokenScores:
        if not torch.is_grad_enabled() or len(packed.ids) > LARGEST_TOKENS:
            return self.compute(packed)
        shape = tuple(tensor.shape for tensor in packed)
        self.seen[shape] += 1
        if self.seen[shape] == 1:
            return self.compute(packed)
        if shape not in self.recordings:
            self.recordings[shape] = self.record(packed)
        scores = Replay.apply(self.recordings[shape], packed, *self.parameters)  # type: ignore[no-untyped-call]
        return TokenScores(*scores)

    def record(self, packed: Packed) -> Recording:
        inputs = Packed(*(tensor.clone() for tensor in packed))
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is set up at a first call must not be recorded
            warm = self.compute(inputs)
            torch.autograd.grad(warm.logps, self.parameters, torch.zeros_like(warm.logps))
            del warm
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.empty_cache()  # the recording takes its memory from a pool of its own
        # what the loader's thread and NCCL's ask of the GPU meanwhile must not spoil the recording
        capture = partial(torch.cuda.graph, pool=self.pool, capture_error_mode="thread_local")
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with capture(forward):
            scores = self.compute(inputs)
        pull = torch.zeros_like(scores.logps)
        with capture(backward):
            gradients = torch.autograd.grad(scores.logps, self.parameters, pull)
            torch.cat([gradient.flatten() for gradient in gradients], out=self.gradients)
        scores = TokenScores(*(value.detach() for value in scores))
        return Recording(inputs, scores, pull, self.gradients, forward, backward)


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, packed: Packed, *parameters: Tensor) -> tuple[Tensor, ...]:
        for kept, new in zip(recording.inputs, packed, strict=True):
            kept.copy_(new, non_blocking=True)
        recording.forward.replay()
        ctx.recording, ctx.shapes = recording, [parameter.shape for parameter in parameters]
        scores = tuple(value.clone() for value in recording.scores)
        ctx.mark_non_differentiable(*scores[1:])
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recording: Recording = ctx.recording
        recording.pull.copy_(grads[0])
        recording.backward.replay()
        parts = recording.gradients.clone().split([shape.numel() for shape in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
