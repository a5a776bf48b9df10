"""How fast a run's bot answers: seconds to the first text, tokens a second for one question and for 32 at once.

    python scripts/answer_speed.py [--run outputs/DATE/TIME] [--dtypes float32 bfloat16] [--threads 2] [--tokens 32]

The model is loaded as infer, chat and serve load it, its adapter added into the weights (merged) or beside them (apart). One
question is answered as they answer it, 32 as a file of questions is. Every answer is --tokens long; a rate includes reading
the questions.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from fitness_dpo import runs
from fitness_dpo.bot import Bot, load
from fitness_dpo.config import SamplingConfig, TrainConfig
from fitness_dpo.data import Message
from fitness_dpo.decoding import decode
from fitness_dpo.inference import ask, stream
from fitness_dpo.model import Policy
from fitness_dpo.template import ChatTemplate

QUESTIONS = [
    f"I'm {age} and have not trained for years. How do I start at home, and how often?" for age in range(41, 73)
]
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", default="latest")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = runs.finished_run(arguments.run)
    trained = runs.load_config(run, TrainConfig)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{arguments.threads} CPU threads"
    print(f"{trained.model.name} of {run}, {machine}, median of {REPEATS}")
    print("dtype     adapter  first text (s)  one question (tokens/s)  32 at once (tokens/s)")
    for dtype in arguments.dtypes:
        bot = Bot(
            replace(trained.model, dtype=dtype, load_in_4bit=False), run, trained.data.system_prompt, trained.data.standardise
        )  # fmt: skip
        for merged in (False, True):
            policy = load(bot, merged=merged)
            prompts = [ask(question, bot.system_prompt, standardised=bot.standardised) for question in QUESTIONS]
            rows = [ChatTemplate(policy.tokenizer).prompt_ids(prompt) for prompt in prompts]
            first = seconds(partial(first_text, policy, prompts[0]))
            one = arguments.tokens / seconds(partial(answer_one, policy, rows[0], arguments.tokens))
            many = len(rows) * arguments.tokens / seconds(partial(decode, policy, rows, [], arguments.tokens))
            print(f"{dtype:9} {'merged' if merged else 'apart':8} {first:14.2f} {one:24.1f} {many:22.1f}", flush=True)


def seconds(work: Callable[[], object]) -> float:
    """The median time of `work`, which ends with its result on the host; once more before, to warm up."""
    taken = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def first_text(policy: Policy, prompt: list[Message]) -> None:
    """Ask, wait for the first text and stop the answer."""
    pieces = stream(
        policy, prompt, SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, max_new_tokens=32, seed=0)
    )
    next(piece for piece in pieces if piece.strip())
    pieces.close()


@torch.inference_mode()
def answer_one(policy: Policy, row: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([row], device=policy.model.device)
    output: torch.Tensor = policy.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
    )  # fmt: skip
    return [int(token) for token in output[0, len(row) :]]


if __name__ == "__main__":
    main()
