"""Time greedy answers in batches against one by one, on the safety prompts.

    python scripts/benchmark_generation.py [MODEL [DTYPE]] [--new-tokens N] [--batches 8,16,32]

One by one is transformers' own generate, as `python -m fitness_dpo.infer` answers. MODEL is the embedded one by default,
DTYPE what model.dtype=auto takes on this machine. Every answer has a fresh LoRA adapter in it, as a run's has.
"""

import argparse
import time
from dataclasses import replace

import peft

from fitness_dpo.bot import UNTUNED
from fitness_dpo.config import SamplingConfig
from fitness_dpo.decoding import answer_all
from fitness_dpo.exam import read_safety
from fitness_dpo.inference import ask, generate
from fitness_dpo.model import Policy, load_base

ALONE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded:smollm2-135m-instruct")
    parser.add_argument("dtype", nargs="?", default="auto")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", default="8,16,32,64")
    given = parser.parse_args()
    base = load_base(replace(UNTUNED, name=given.model, dtype=given.dtype))
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    policy = Policy(peft.get_peft_model(base.model, lora).eval(), base.tokenizer)
    prompts = [ask(prompt.prompt, "You are a fitness coach.") for prompt in read_safety("fitness_eval")]
    sampling = SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, max_new_tokens=given.new_tokens, seed=0)
    generate(policy, prompts[:1], sampling)  # warm up
    start = time.perf_counter()
    alone = [generate(policy, [prompt], sampling)[0] for prompt in prompts[:ALONE]]
    seconds = time.perf_counter() - start
    tokens = sum(answer.tokens for _, answer in answer_all(policy, prompts[:ALONE], given.new_tokens, ALONE))
    print(f"{policy.model.device} {policy.model.dtype}, {given.new_tokens} new tokens at most")
    print(f"one by one  {tokens / seconds:8.1f} tokens/s")
    for size in map(int, given.batches.split(",")):
        start = time.perf_counter()
        answers = dict(answer_all(policy, prompts[:size], given.new_tokens, size))
        rate = sum(answer.tokens for answer in answers.values()) / (time.perf_counter() - start)
        same = sum(answers[place].text == text for place, text in enumerate(alone[:size]))
        print(
            f"batch {size:4}  {rate:8.1f} tokens/s  {rate * seconds / tokens:.1f} times, {same} of {ALONE} answers the same"
        )


if __name__ == "__main__":
    main()
