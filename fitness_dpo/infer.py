"""python -m fitness_dpo.infer: ask the tuned model one question (prompt= or standard input), or talk with it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fitness_dpo import runs
from fitness_dpo.cli import verb
from fitness_dpo.config import InferConfig, InputError, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from fitness_dpo.data import Message
    from fitness_dpo.model import Policy

UNTUNED = ModelConfig(
    name="none", revision=None, backend="transformers", max_length_tokens=2048, load_in_4bit=False, dtype="auto",
    gradient_checkpointing="false", trust_remote_code=False,
)  # fmt: skip


def main(config: InferConfig, _: Path) -> None:
    question = config.prompt
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise InputError(
                'prompt=null: no question and no terminal to ask for one; add prompt="How much protein do I need?"'
            )
    from fitness_dpo.inference import ask, check_window, generate

    policy, model, system_prompt = load(config)
    if question is None:
        converse(policy, model, config, system_prompt)
        return
    messages = ask(question, system_prompt)
    check_window(policy, messages, model.max_length_tokens)
    print(generate(policy, [messages], config.sampling)[0])  # noqa: T201


def load(config: InferConfig) -> "tuple[Policy, ModelConfig, str | None]":
    """The model to ask, its settings and its system prompt: a run's adapter, or `model.name` as it is."""
    from fitness_dpo.model import load_base, load_trained, override

    if config.model.name is not None:
        model = override(UNTUNED, config.model)
        return load_base(model), model, config.system_prompt
    run = runs.finished_run(config.run)
    trained = runs.load_config(run, TrainConfig)
    system_prompt = trained.data.system_prompt if config.system_prompt is None else config.system_prompt
    model = override(trained.model, config.model)
    return load_trained(run, model), model, system_prompt


def converse(policy: "Policy", model: ModelConfig, config: InferConfig, system_prompt: str | None) -> None:
    """Ask and answer in the terminal until an empty line or Ctrl-D; each answer is printed as it is generated."""
    from fitness_dpo.inference import ask, check_window, stream

    console = Console()
    history: list[Message] = []
    console.print("[dim]Ask about training, food or recovery. An empty line ends the conversation.[/]")
    while question := read_line(console):
        messages = ask(question, system_prompt, tuple(history))
        check_window(policy, messages, model.max_length_tokens)
        answer = ""
        for piece in stream(policy, messages, config.sampling):
            console.out(piece, end="", highlight=False)
            answer += piece
        console.print()
        history += [messages[-1], {"role": "assistant", "content": answer.strip()}]


def read_line(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    verb("infer", InferConfig, main)
