"""Measures both sides, base and tuned, on every item. They are one set of weights, the adapter off and on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from fitness_dpo import runs
from fitness_dpo.config import ModelConfig
from fitness_dpo.data import Example, Message
from fitness_dpo.decoding import answer_all
from fitness_dpo.exam import QuizQuestion, SafetyPrompt
from fitness_dpo.inference import ask, merged_for_now
from fitness_dpo.items import Items
from fitness_dpo.likelihood import Item, score_all
from fitness_dpo.model import Policy, load_base, load_trained
from fitness_dpo.template import ChatTemplate

BASE, TUNED = "base", "tuned"


class Material(NamedTuple):
    """What is asked."""

    rows: list[Example]
    """Held-out pairs."""
    quiz: list[QuizQuestion]
    safety: list[SafetyPrompt]
    questions: list[Example]
    """Pairs whose questions are answered side by side."""
    system_prompt: str | None
    standardised: bool

    def ask(self, question: str) -> list[Message]:
        return ask(question, self.system_prompt, standardised=self.standardised)


class Subject(NamedTuple):
    """What is measured, and what it is compared with."""

    model: ModelConfig
    run: Path | None
    """The run whose adapter is measured; None for the model itself, which is compared with nothing."""
    against: Path | None
    """The run that stands where the base would."""

    @property
    def sides(self) -> tuple[str, ...]:
        return (TUNED,) if self.run is None else (BASE, TUNED)


def load(subject: Subject) -> Policy:
    return load_base(subject.model) if subject.run is None else load_trained(subject.run, subject.model)


@contextmanager
def acting_as(side: str, policy: Policy, subject: Subject) -> Iterator[Policy]:
    """The policy of one side: the weights of `policy` with its adapter, with none, or with that of `subject.against`.

    In float32 the tuned side's adapter is added into the weights for good: it comes last, and answers sooner so.
    """
    model = policy.model
    if side == TUNED:
        exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
        if exact and hasattr(model, "merge_and_unload"):
            policy = policy._replace(model=model.merge_and_unload(adapter_names=["default"]))
        yield policy
        return
    if any(config.bias != "none" for config in model.peft_config.values()):  # PEFT cannot put trained biases back
        yield load_base(subject.model) if subject.against is None else load_trained(subject.against, subject.model)
    elif subject.against is None:
        with model.disable_adapter():
            yield policy
    else:
        if "against" not in model.peft_config:
            model.load_adapter(str(subject.against / runs.ADAPTER), adapter_name="against")
        model.set_adapter("against")
        try:
            with merged_for_now(model):  # as the tuned side, so that only the adapters differ
                yield policy
        finally:
            model.set_adapter("default")


def count(material: Material, sides: Sequence[str]) -> int:
    """All items of an evaluation."""
    kinds = len(material.rows), len(material.quiz), len(material.safety), len(material.questions)
    return len(sides) * sum(kinds)


def measure(
    policy: Policy, subject: Subject, material: Material, items: Items, max_new_tokens: int, batch_size: int,
    advance: Callable[[str], None],
) -> None:  # fmt: skip
    """Fill `items` with what is missing in them. `advance` is told the kind of each item that is done."""
    template = ChatTemplate(policy.tokenizer)
    for side in subject.sides:
        with acting_as(side, policy, subject) as actor:
            for kind, scored in (("preference", _pairs(material, template)), ("quiz", _options(material, template))):
                left = items.missing(kind, side, len(scored))
                for place, logps in score_all(actor, [scored[item][1] for item in left], batch_size):
                    identity, item = scored[left[place]]
                    tokens = list(map(len, item.answers))
                    items.add(kind, side, left[place], id=identity, logps=logps, tokens=tokens)
                    advance(kind)
            for kind, asked in (
                ("safety", [(prompt.id, prompt.prompt, material.ask(prompt.prompt)) for prompt in material.safety]),
                ("side_by_side", [(row.id, row.prompt[-1]["content"], row.prompt) for row in material.questions]),
            ):
                left = items.missing(kind, side, len(asked))
                prompts = [asked[item][2] for item in left]
                for place, answer in answer_all(actor, prompts, max_new_tokens, batch_size):
                    identity, question, _ = asked[left[place]]
                    items.add(
                        kind, side, left[place], id=identity, prompt=question, answer=answer.text,
                        tokens=answer.tokens, ended=answer.ended,
                    )  # fmt: skip
                    advance(kind)


def _pairs(material: Material, template: ChatTemplate) -> list[tuple[str, Item]]:
    pairs = [template.pair_ids(row.prompt, row.chosen, row.rejected) for row in material.rows]
    return [
        (row.id, Item(pair.prompt_ids, [pair.chosen_ids, pair.rejected_ids]))
        for row, pair in zip(material.rows, pairs, strict=True)
    ]


def _options(material: Material, template: ChatTemplate) -> list[tuple[str, Item]]:
    """Each option as the whole answer but for its end-of-turn token: ending after a few words is unlike a model's habit."""
    prompts = [material.ask(question.question) for question in material.quiz]
    return [
        (
            question.id,
            Item(
                template.prompt_ids(prompt), [template.answer_ids(prompt, option)[:-1] for option in question.options]
            ),
        )
        for question, prompt in zip(material.quiz, prompts, strict=True)
    ]
