"""Does an export answer as the run does? Greedy answers and log-probabilities of the two, token by token."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fitness_dpo.config import InputError, ParityConfig
from fitness_dpo.inference import ask, end_tokens
from fitness_dpo.model import Policy, device
from fitness_dpo.template import ChatTemplate


class Answerer(Protocol):
    """A model that can be asked, wherever it runs."""

    def prompt_ids(self, question: str) -> list[int]:
        """What the model is given when it is asked `question`, and nothing is said about a system prompt."""

    def answer_ids(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The greedy answer, its end-of-turn token last unless it was cut."""

    def logps(self, prompt_ids: list[int], answer_ids: list[int]) -> NDArray[np.float32]:
        """(answer, vocabulary): log-probabilities in nats at each token of the answer, given those before."""


class TorchAnswerer:
    """A transformers or PEFT model."""

    def __init__(self, policy: Policy, system_prompt: str | None = None, *, standardised: bool = True) -> None:
        self.policy, self.template = policy, ChatTemplate(policy.tokenizer)
        self.system_prompt, self.standardised = system_prompt, standardised

    def prompt_ids(self, question: str) -> list[int]:
        return self.template.prompt_ids(ask(question, self.system_prompt, standardised=self.standardised))

    @torch.no_grad()
    def answer_ids(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt_ids], device=self.policy.model.device)
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end_tokens(self.policy),
            pad_token_id=self.policy.tokenizer.pad_token_id,
        )  # fmt: skip
        output = self.policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
        answer: list[int] = output[0, len(prompt_ids) :].tolist()
        return answer

    @torch.no_grad()
    def logps(self, prompt_ids: list[int], answer_ids: list[int]) -> NDArray[np.float32]:
        ids = torch.tensor([prompt_ids + answer_ids], device=self.policy.model.device)
        logits = self.policy.model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
        rows: NDArray[np.float32] = logits.float().log_softmax(-1).cpu().numpy()
        return rows


def load_merged(folder: Path) -> TorchAnswerer:
    """The model that `folder` holds, computing in float32, asked through the chat template it brings."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": device()})
    return TorchAnswerer(Policy(model.eval(), AutoTokenizer.from_pretrained(folder)))


class Answered(NamedTuple):
    question: str
    prompt_ids: list[int]
    answer_ids: list[int]
    logps: NDArray[np.float32]
    """The adapter's, (answer, vocabulary)."""
    untuned: NDArray[np.float32]
    """The base model's, of the answer's tokens alone."""

    def taken(self, logps: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of (answer, vocabulary), the answer's own tokens."""
        return logps[np.arange(len(self.answer_ids)), self.answer_ids]


class Difference(NamedTuple):
    """How a model's answers differ from the adapter's."""

    name: str
    questions: int
    same: int
    """Questions answered token for token as the adapter answers them."""
    parted: tuple[str, ...]
    """Questions whose answer takes a token that the adapter finds plainly less likely than its own."""
    largest: float
    """Largest difference in the log-probability of one answer token, in nats."""
    mean: float
    kept: float
    """How much of what the adapter changed is in this model: 1 all of it, 0 nothing, 2 twice as much."""
    kept_error: float
    """The standard error of `kept`: what rounding alone may do to it."""
    threshold: float | None
    """What `largest` may be; None where nothing is required."""
    kept_threshold: float
    """How far `kept` may be from 1, beyond three standard errors."""

    def line(self) -> str:
        return (
            f"{self.name}: {self.same} of {self.questions} greedy answers the same, at most {self.largest:.2g} nats a token "
            f"apart, {self.mean:.2g} on average; {self.kept:.2f} ± {self.kept_error:.2f} of the tuning kept"
        )

    def breach(self) -> str | None:
        """What is wrong, in one line, or None."""
        if self.threshold is None:
            return None
        if abs(self.kept - 1) > self.kept_threshold + 3 * self.kept_error:
            return (
                f"{self.name} carries {self.kept:.2f} ± {self.kept_error:.2f} of what the training changed, "
                "so its adapter was lost or scaled, or rounding outweighs a small change, which a finer quantization keeps"
            )
        if self.largest <= self.threshold and not self.parted:
            return None
        parted = f"; another answer to {self.parted[0]!r}" if self.parted else ""
        return (
            f"{self.name} differs from the adapter by up to {self.largest:.3g} nats a token where {self.threshold:g} are "
            f"allowed{parted}"
        )


def answers(adapter: TorchAnswerer, config: ParityConfig) -> list[Answered]:
    """What the adapter answers, to compare others with."""
    found = []
    for question in config.prompts:
        prompt_ids = adapter.prompt_ids(question)
        answer_ids = adapter.answer_ids(prompt_ids, config.max_new_tokens)
        row = Answered(question, prompt_ids, answer_ids, adapter.logps(prompt_ids, answer_ids), np.empty(0, np.float32))
        with adapter.policy.model.disable_adapter():
            found.append(row._replace(untuned=row.taken(adapter.logps(prompt_ids, answer_ids))))
    return found


def compare(
    name: str, model: Answerer, reference: list[Answered], threshold: float | None, kept_threshold: float
) -> Difference:
    """Ask `model` the same questions.

    Answers may part only at a tie: a model whose log-probabilities lie within t of the adapter's picks another token only
    where the adapter's own two differ by less than 2t. What is kept of the tuning is 1 less the slope of the model's
    differences on the base's, by least squares. Raises InputError where `model` is given other tokens to answer.
    """
    same, parted = 0, []
    differences, effects = [], []
    for row in reference:
        given = model.prompt_ids(row.question)
        if given != row.prompt_ids:
            raise InputError(
                f"{name}: asks {row.question!r} in other tokens than training did: {given} for {row.prompt_ids}"
            )
        tuned = row.taken(row.logps)
        differences.append(row.taken(model.logps(row.prompt_ids, row.answer_ids)) - tuned)
        effects.append(row.untuned - tuned)
        answer = model.answer_ids(row.prompt_ids, len(row.answer_ids))
        if answer == row.answer_ids:
            same += 1
            continue
        at = next(at for at, pair in enumerate(zip(answer, row.answer_ids, strict=False)) if pair[0] != pair[1])
        gap = row.logps[at, row.answer_ids[at]] - row.logps[at, answer[at]]
        if threshold is not None and gap > 2 * threshold:
            parted.append(row.question)
    difference = np.concatenate(differences)
    kept, error = slope(difference, np.concatenate(effects))
    size = np.abs(difference)
    return Difference(
        name, len(reference), same, tuple(parted), float(size.max()), float(size.mean()), kept, error, threshold, kept_threshold
    )  # fmt: skip


def slope(difference: NDArray[np.float32], effect: NDArray[np.float32]) -> tuple[float, float]:
    """1 less the least-squares slope of `difference` on `effect`, and its standard error; (1, inf) without an effect."""
    power = float(effect @ effect)
    if power == 0:
        return 1.0, float("inf")
    lost = float(difference @ effect) / power
    noise = difference - lost * effect
    return 1 - lost, float(np.sqrt(noise @ noise / max(len(noise) - 1, 1) / power))


def table(differences: list[Difference]) -> Table:
    shown = Table(title="beside the adapter, in nats a token", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "same answers", "largest", "allowed", "mean", "tuning kept"):
        shown.add_column(heading, justify="left" if not heading else "right")
    for row in differences:
        allowed = "" if row.threshold is None else f"{row.threshold:g}"
        shown.add_row(
            row.name, f"{row.same} of {row.questions}", f"{row.largest:.2g}", allowed, f"{row.mean:.2g}",
            f"{row.kept:.2f} ± {row.kept_error:.2f}",
        )  # fmt: skip
    return shown
