"""How fast a model answers: seconds to the first text, tokens a second for one question and for 32 at once.

    python scripts/answer_speed.py [--model NAME] [--dtypes float32 bfloat16] [--threads 2]

Random LoRA weights of rank 16 stand in for a trained adapter: they cost the same. Every answer is 32 tokens long.
"""

import argparse
import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model

from fitness_dpo.bot import UNTUNED
from fitness_dpo.config import ModelOverrides, SamplingConfig
from fitness_dpo.inference import ask, stream
from fitness_dpo.model import Policy, load_base, override
from fitness_dpo.template import ChatTemplate

QUESTION = "I'm 62 and have not trained for years. How do I start strength training at home, and how often?"
SYSTEM = "You are a careful fitness coach."
TOKENS, REPEATS, BATCH = 32, 3, 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.model}, {'GPU' if torch.cuda.is_available() else f'{arguments.threads} CPU threads'}")
    print("dtype     adapter  first text (s)  one question (tokens/s)  32 at once (tokens/s)")
    for dtype in arguments.dtypes:
        for merged in (False, True):
            policy = load(arguments.model, dtype, merged=merged)
            first = median(first_text(policy) for _ in range(REPEATS))
            one, many = (median(rate(policy, rows) for _ in range(REPEATS)) for rows in (1, BATCH))
            print(f"{dtype:9} {'merged' if merged else 'apart':8} {first:14.2f} {one:24.1f} {many:22.1f}", flush=True)


def load(name: str, dtype: str, *, merged: bool) -> Policy:
    overrides = ModelOverrides(
        name=name, revision=None, max_length_tokens=None, load_in_4bit=None, dtype=dtype, trust_remote_code=None
    )
    base = load_base(override(UNTUNED, overrides))
    model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    policy = base._replace(model=model.merge_and_unload() if merged else model)
    first_text(policy)  # warm up
    return policy


def first_text(policy: Policy) -> float:
    """Seconds until the first piece of an answer, its question already typed."""
    sampling = SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, max_new_tokens=TOKENS, seed=0)
    began = time.perf_counter()
    pieces = stream(policy, ask(QUESTION, SYSTEM), sampling)
    next(piece for piece in pieces if piece.strip())
    seconds = time.perf_counter() - began
    pieces.close()
    return seconds


def rate(policy: Policy, rows: int) -> float:
    """New tokens a second, reading the question included."""
    ids = torch.tensor([ChatTemplate(policy.tokenizer).prompt_ids(ask(QUESTION, SYSTEM))] * rows).to(
        policy.model.device
    )
    began = time.perf_counter()
    with torch.no_grad():
        policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
        )
    return rows * TOKENS / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
