"""CUDA graphs of a forward and a backward pass: the GPU repeats a recorded step without waiting for Python's launches."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fitness_dpo.decoder import Adapted, Layer
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
    """That of `Recorder.whole`; the same place for all recordings."""
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Recorder:
    """Computes `score(packed, layers)` from a recording of the batch's shape. `whole` gets the gradients, in whose memory the layers'
    factors lie.

    All recordings share one pool of memory, so each replay of a forward pass must be followed by its backward pass before the
    next one. A batch with more tokens than any before discards all recordings and starts a new pool: the pieces of a pool are
    as large as its first recording wants them, and smaller ones fit in.
    """

    def __init__(
        self, score: Callable[[Packed, list[Layer]], TokenScores], layers: list[Layer], whole: torch.nn.Parameter
    ) -> None:
        self.score, self.layers, self.whole = score, layers, whole
        self.aside = torch.cuda.Stream()  # cuBLAS keeps a workspace of 32 MiB for each stream it meets
        self.gradients = torch.empty_like(whole)
        self.largest = 0

    def __call__(self, packed: Packed) -> TokenScores:
        tokens, shape = len(packed.ids), tuple(tensor.shape for tensor in packed)
        if not torch.is_grad_enabled() or tokens > LARGEST_TOKENS:
            return self.score(packed, self.layers)
        if tokens > self.largest:
            self.start(tokens)
        if shape not in self.recordings:
            self.recordings[shape] = self.record(packed)
        scores = Replay.apply(self.recordings[shape], packed, self.whole)  # type: ignore[no-untyped-call]
        return TokenScores(*scores)

    def start(self, largest: int) -> None:
        torch.cuda.synchronize()  # the old pool may be under the last step's replay, on another stream than it was made on
        gc.collect()  # a recorder that was discarded frees its pool, which would break a recording off
        self.largest = largest
        self.recordings: dict[tuple[torch.Size, ...], Recording] = {}
        self.pool = torch.cuda.MemPool()

    def record(self, packed: Packed) -> Recording:
        # a graph that still waits for its backward pass keeps nodes at the parameters, on the stream of its forward pass
        layers = [layer.each(Adapted.apart) for layer in self.layers]
        factors = sorted((factor for layer in layers for factor in layer.factors()), key=Tensor.storage_offset)
        inputs = Packed(*(tensor.clone() for tensor in packed))
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # what the loader's thread and NCCL's ask of the GPU meanwhile must not spoil the recording
        pool: Any = self.pool.id
        capture = partial(torch.cuda.graph, pool=pool, stream=self.aside, capture_error_mode="thread_local")
        torch.cuda.empty_cache()  # the pool can't have what lies free outside it
        self.aside.wait_stream(torch.cuda.current_stream())
        with torch.autograd.set_multithreading_enabled(False):  # the pool is this thread's
            with torch.cuda.stream(self.aside), torch.cuda.use_mem_pool(self.pool):
                warm = self.score(inputs, layers)  # what is set up at a first call must not be recorded
                torch.autograd.grad(warm.logps, factors, torch.zeros_like(warm.logps))
                del warm
            with capture(forward):
                scores = self.score(inputs, layers)
            pull = torch.zeros_like(scores.logps)
            with capture(backward):
                gradients = torch.autograd.grad(scores.logps, factors, pull)
                torch.cat([gradient.flatten() for gradient in gradients], out=self.gradients)
        torch.cuda.current_stream().wait_stream(self.aside)
        scores = TokenScores(*(value.detach() for value in scores))
        return Recording(inputs, scores, pull, self.gradients, forward, backward)


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, packed: Packed, whole: Tensor) -> tuple[Tensor, ...]:
        for kept, new in zip(recording.inputs, packed, strict=True):
            kept.copy_(new, non_blocking=True)
        recording.forward.replay()
        ctx.recording = recording
        scores = tuple(value.clone() for value in recording.scores)
        ctx.mark_non_differentiable(*scores[1:])
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        recording: Recording = ctx.recording
        recording.pull.copy_(grads[0])
        recording.backward.replay()
        return None, None, recording.gradients
