"""A GGUF file asked through llama.cpp, in a process of its own: what its C++ does not like ends the process it is in."""

import importlib
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from fitness_dpo.config import InputError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Child:
    """A process that calls functions for us, one after the other."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def call(self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """`function`'s result. Raises InputError where the process died of it."""
        try:
            return self.pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise InputError("llama_cpp: llama.cpp crashed on this model; use format=merged") from error


@contextmanager
def apart() -> Iterator[Child]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield Child(pool)


def quiet_llama() -> Any:
    """llama-cpp-python, silent."""
    llama = importlib.import_module("llama_cpp")
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return llama


class LlamaAnswerer:
    """The file as its users meet it: with the chat template and the tokenizer it brings. See parity.Answerer."""

    def __init__(self, file: Path, window: int, child: Child) -> None:
        """window: tokens of the longest conversation."""
        self.child = child
        child.call(_load, str(file), window)

    def prompt_ids(self, question: str) -> list[int]:
        return self.child.call(_prompt_ids, question)

    def answer_ids(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        return self.child.call(_answer_ids, prompt_ids, max_new_tokens)

    def logps(self, prompt_ids: list[int], answer_ids: list[int]) -> NDArray[np.float32]:
        return self.child.call(_logps, prompt_ids, answer_ids)


# What follows runs in the child, which keeps the model it loaded.
_loaded: list[Any] = []


def _load(file: str, window: int) -> None:
    llama = quiet_llama()
    _loaded[:] = [
        llama.Llama(file, n_ctx=window, n_batch=window, n_ubatch=window, logits_all=True, verbose=False),
    ]


def _prompt_ids(question: str) -> list[int]:
    (model,) = _loaded
    special = {
        name: model.detokenize([token], special=True).decode() if token >= 0 else ""
        for name, token in (("bos_token", model.token_bos()), ("eos_token", model.token_eos()))
    }
    formats = importlib.import_module("llama_cpp.llama_chat_format")
    render = formats.Jinja2ChatFormatter(template=model.metadata["tokenizer.chat_template"], **special)
    rendered = render(messages=[{"role": "user", "content": question}])
    ids: list[int] = model.tokenize(rendered.prompt.encode(), add_bos=not rendered.added_special, special=True)
    return ids


def _answer_ids(prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    (model,) = _loaded
    model.reset()
    model.eval(prompt_ids)
    answer: list[int] = []
    while True:
        answer.append(int(model.scores[model.n_tokens - 1].argmax()))
        if len(answer) == max_new_tokens or quiet_llama().llama_vocab_is_eog(model._model.vocab, answer[-1]):
            return answer
        model.eval(answer[-1:])


def _logps(prompt_ids: list[int], answer_ids: list[int]) -> NDArray[np.float32]:
    (model,) = _loaded
    model.reset()
    model.eval(prompt_ids + answer_ids)
    logits = model.scores[len(prompt_ids) - 1 : model.n_tokens - 1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logps: NDArray[np.float32] = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    return logps
