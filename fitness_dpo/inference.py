"""Conversations -> answers. Training samples, evaluation and chat all come through here."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from threading import Event
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fitness_dpo.cleaning import encodable
from fitness_dpo.config import SamplingConfig
from fitness_dpo.data import Message, standardise
from fitness_dpo.model import Policy
from fitness_dpo.template import ChatTemplate


def ask(
    question: str, system_prompt: str | None, history: tuple[Message, ...] = (), *, standardised: bool = True
) -> list[Message]:
    """The conversation that ends with `question`, its text cleaned as `data.standardise` cleans training rows."""
    clean = standardise if standardised else encodable
    system = [{"role": "system", "content": clean(system_prompt)}] if system_prompt else []
    return [*system, *history, {"role": "user", "content": clean(question)}]


def generate(policy: Policy, prompts: list[list[Message]], sampling: SamplingConfig) -> list[str]:
    """One answer for each prompt, in one batch. Prompts are padded on the left, on the model's own device."""
    template = ChatTemplate(policy.tokenizer)
    rows = [template.prompt_ids(prompt) for prompt in prompts]
    width = max(map(len, rows))
    inputs = torch.tensor([[policy.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with answering(policy.model, sampling):
        output = policy.model.generate(
            input_ids=inputs.to(policy.model.device), attention_mask=mask.to(policy.model.device),
            generation_config=generation_config(policy, sampling),
        )  # fmt: skip
    answers: list[str] = policy.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


class Pieces(BaseStreamer):
    """Turns tokens into text as they are generated. Nothing is held back but a character whose bytes are not all there."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.queue = tokenizer, Queue[str | None]()
        self.ids: list[int] | None = None
        self.sent = 0

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # transformers sends the prompt first
            self.ids = []
            return
        self.ids += value.tolist()
        text = self.text()
        if not text.endswith("\ufffd"):
            self.send(text)

    def end(self) -> None:
        self.send(self.text())
        self.queue.put(None)

    def text(self) -> str:
        text: str = self.tokenizer.decode(self.ids or [], skip_special_tokens=True)
        return text

    def send(self, text: str) -> None:
        if len(text) > self.sent:
            self.queue.put(text[self.sent :])
            self.sent = len(text)


def stream(policy: Policy, prompt: list[Message], sampling: SamplingConfig) -> Generator[str, None, None]:
    """The answer to one prompt, piece by piece as it is generated. Closing it stops the model within a token."""
    ids = ChatTemplate(policy.tokenizer).prompt_ids(prompt)
    streamer, stopped = Pieces(policy.tokenizer), Event()
    inputs = torch.tensor([ids], device=policy.model.device)
    arguments: dict[str, Any] = {
        "input_ids": inputs, "attention_mask": torch.ones_like(inputs),
        "generation_config": generation_config(policy, sampling), "streamer": streamer,
        "stopping_criteria": StoppingCriteriaList(
            [lambda ids, *_, **__: torch.full((len(ids),), stopped.is_set(), device=ids.device)]
        ),
    }  # fmt: skip

    def run() -> None:
        try:
            with answering(policy.model, sampling):
                policy.model.generate(**arguments)
        finally:
            streamer.end()

    with ThreadPoolExecutor(1) as worker:
        done = worker.submit(run)
        try:
            yield from iter(streamer.queue.get, None)
        finally:
            stopped.set()
        done.result()


@contextmanager
def answering(model: Any, sampling: SamplingConfig) -> Iterator[None]:
    """Put the model in generation mode and back, drawing from `sampling.seed` without moving training's random state."""
    training, device = model.training, model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(sampling.seed)
        model.for_inference() if hasattr(model, "for_inference") else model.eval()
        try:
            yield
        finally:
            if training:
                model.for_training() if hasattr(model, "for_training") else model.train()


@contextmanager
def merged_for_now(model: Any) -> Iterator[None]:
    """Add the adapter into a copy of the weights for a few answers, which come a quarter sooner. Float32 on a CPU only: elsewhere a
    copy is too large, rounds, or wins nothing."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if model.device.type != "cpu" or any(layer.weight.dtype != torch.float32 for layer in layers):
        yield
        return
    weights = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = layer.weight.data.clone()
    try:
        model.merge_adapter()
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.data = weight
            layer.merged_adapters.clear()


def generation_config(policy: Policy, sampling: SamplingConfig) -> GenerationConfig:
    """How transformers draws an answer under these settings."""
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.do_sample else {}
    return GenerationConfig(
        do_sample=sampling.do_sample, max_new_tokens=sampling.max_new_tokens, use_cache=True,
        eos_token_id=end_tokens(policy), pad_token_id=policy.tokenizer.pad_token_id, **drawn,
    )  # fmt: skip


def end_tokens(policy: Policy) -> list[int]:
    """The tokens that end an answer: the tokenizer's and those the model's own settings name."""
    known = policy.model.generation_config.eos_token_id
    return sorted({policy.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None})
