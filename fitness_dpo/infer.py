"""python -m fitness_dpo.infer: ask the tuned model one question, a file of them, or talk with it in the terminal."""

import sys
from pathlib import Path

from rich.console import Console

from fitness_dpo.bot import find, load
from fitness_dpo.bulk import answer_file
from fitness_dpo.cli import verb
from fitness_dpo.config import InferConfig, InputError


def main(config: InferConfig, _: Path) -> None:
    if config.input is not None and config.output is not None:
        answer_file(find(config), config, Path(config.input), Path(config.output))
        return
    question = config.prompt
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read()
    if question is not None and not question.strip():
        raise InputError('prompt="": there is no question; add prompt="How much protein do I need?"')
    bot = find(config)
    from fitness_dpo.conversation import Conversation
    from fitness_dpo.inference import generate
    from fitness_dpo.terminal import converse, line_reader

    talk = Conversation(load(bot, merged=question is not None), bot, config.sampling)
    if question is None:
        converse(talk, Console(), line_reader())
        return
    prompt, _forgotten = talk.prompt(question)
    print(generate(talk.policy, [prompt], config.sampling)[0])  # noqa: T201


if __name__ == "__main__":
    verb("infer", InferConfig, main)
