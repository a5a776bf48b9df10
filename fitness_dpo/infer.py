"""python -m fitness_dpo.infer: ask the tuned model one question (prompt= or standard input), or talk with it."""

import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from fitness_dpo import runs
from fitness_dpo.cli import verb
from fitness_dpo.config import InferConfig, InputError, ModelConfig, TrainConfig
from fitness_dpo.data import Message
from fitness_dpo.model import Policy, load_base, load_trained, override

UNTUNED = ModelConfig(
    name="none", revision=None, backend="transformers", max_length_tokens=2048, load_in_4bit=False, dtype="auto",
    gradient_checkpointing="false", trust_remote_code=False,
)  # fmt: skip


class Bot(NamedTuple):
    model: ModelConfig
    run: Path | None
    """The run whose adapter answers; None for a model as it is."""
    system_prompt: str | None
    standardised: bool


def main(config: InferConfig, _: Path) -> None:
    question = config.prompt
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise InputError(
                'prompt=null: no question and no terminal to ask for one; add prompt="How much protein do I need?"'
            )
    bot = find(config)
    from fitness_dpo.inference import ask, check_window, generate

    policy = load_base(bot.model) if bot.run is None else load_trained(bot.run, bot.model)
    if question is None:
        converse(policy, bot, config)
        return
    messages = ask(question, bot.system_prompt, standardised=bot.standardised)
    check_window(policy, messages, bot.model.max_length_tokens)
    print(generate(policy, [messages], config.sampling)[0])  # noqa: T201


def find(config: InferConfig) -> Bot:
    """What answers: a run's adapter with its settings, or `model.name` as it is. Imports no torch."""
    if config.model.name is not None:
        return Bot(override(UNTUNED, config.model), None, config.system_prompt, standardised=True)
    run = runs.finished_run(config.run)
    trained = runs.load_config(run, TrainConfig)
    system_prompt = trained.data.system_prompt if config.system_prompt is None else config.system_prompt
    return Bot(override(trained.model, config.model), run, system_prompt, trained.data.standardise)


def converse(policy: Policy, bot: Bot, config: InferConfig) -> None:
    """Ask and answer in the terminal until an empty line or Ctrl-D; each answer is printed as it is generated."""
    from fitness_dpo.inference import ask, check_window, prompt_length, stream

    console = Console()
    history: list[Message] = []
    room = bot.model.max_length_tokens - config.sampling.max_new_tokens
    console.print("[dim]Ask about training, food or recovery. An empty line ends the conversation.[/]")
    while question := read_line(console):
        messages = ask(question, bot.system_prompt, tuple(history), standardised=bot.standardised)
        while history and prompt_length(policy, messages) > room:
            console.print("[dim]The oldest question and answer no longer fit and are forgotten.[/]")
            history = history[2:]
            messages = ask(question, bot.system_prompt, tuple(history), standardised=bot.standardised)
        check_window(policy, messages, bot.model.max_length_tokens)
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
