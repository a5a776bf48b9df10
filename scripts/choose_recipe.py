"""Choose the embedded model's recipe on the validation split, then measure it on the test split over three seeds.

    python scripts/choose_recipe.py --at-once 12 --output recipe

Every run is a `python -m fitness_dpo.train` of the embedded set, side by side on one GPU. Of the candidates whose answers to the
validation prompts are sound (see `sound`), the one with the highest held-out accuracy is trained anew with seeds 1, 2 and 3,
and only those runs are shown the test split. recipe/sweep.json has the candidates, recipe/seed-N/evaluation/metrics.json
the measures.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

COMMON = [
    "model=smollm2_135m", "model.backend=transformers", "dpo.eval_batch_size=77", "logging.wandb.mode=disabled",
    "logging.sample_steps=null", "logging.sample_prompts=[]", "logging.console=false", "dpo.logging_steps=5",
]  # fmt: skip
WIDE = ["lora.r=64", "lora.alpha=128"]
NEW_TOKENS = 160
"""The longest chosen answer has 164."""


def with_sft(weight: float, loss: str = "sigmoid") -> list[str]:
    return [f"dpo.loss_type=[{loss},sft]", f"dpo.loss_weights=[1,{weight}]"]


CANDIDATES = [
    [f"dpo.learning_rate={rate}", f"dpo.epochs={epochs}", *more]
    for rate, epochs, more in (
        *(("2e-4", epochs, WIDE) for epochs in (1, 2)),
        *((rate, 2, [*WIDE, *with_sft(weight)]) for rate, weight in product(("2e-4", "3e-4", "5e-4"), (0.05, 0.1, 0.2))),
        *((rate, 3, [*WIDE, *with_sft(weight)]) for rate, weight in product(("1e-4", "2e-4"), (0.05, 0.1, 0.2))),
        *((rate, 2, with_sft(0.1)) for rate in ("3e-4", "5e-4")),
        *(("2e-4", 2, [*WIDE, *with_sft(0.1), f"dpo.beta={beta}"]) for beta in (0.05, 0.3)),
        ("2e-4", 2, [*WIDE, *with_sft(0.1, "apo_zero")]), ("2e-4", 2, [*WIDE, *with_sft(0.1, "sigmoid_norm"), "dpo.beta=5"]),
        ("1e-4", 4, [*WIDE, *with_sft(0.1)]),
    )
]  # fmt: skip


def prepare() -> None:
    """What a process needs once. Importing takes longer than a run."""
    from omegaconf import OmegaConf

    from fitness_dpo import config as settings

    settings.register()
    OmegaConf.register_new_resolver("default_model", lambda: "smollm2_135m", replace=True)


def train(overrides: list[str], run: Path) -> dict[str, Any]:
    """Train in this process: the run's figures on the validation split."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from rich.console import Console

    from fitness_dpo.interruption import Interruption
    from fitness_dpo.train import train as train_run

    with initialize_config_module("fitness_dpo.conf", version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("config", overrides=[*COMMON, *overrides]))
    metrics = train_run(config, run, Console(quiet=True), Interruption())
    after, pairs = metrics["after"], metrics["held_out_pairs"]
    return {
        "overrides": " ".join(overrides), "accuracy": after["eval_rewards/accuracies"], "margin": after["eval_rewards/margins"],
        "loss": after["eval_loss"], "chosen_change": after["eval_rewards/chosen"] / config.dpo.beta,
        "chosen_likelier": sum(each > 0 for each in pairs["after"]) / len(pairs["after"]),
        "chosen_likelier_base": sum(each > 0 for each in pairs["before"]) / len(pairs["before"]),
        "seconds": metrics["seconds"], **answers(config, run, adapted=True),
    }  # fmt: skip


def answers(config: Any, run: Path, *, adapted: bool) -> dict[str, float]:
    """How the answers to the validation prompts end and repeat themselves."""
    from fitness_dpo.data import load_preferences
    from fitness_dpo.decoding import answer_all
    from fitness_dpo.measures import per_answer
    from fitness_dpo.model import load_trained

    policy = load_trained(run, config.model)
    prompts = [row.prompt for row in load_preferences(config.data).splits["validation"]]
    with nullcontext() if adapted else policy.model.disable_adapter():
        found = [answer for _, answer in answer_all(policy, prompts, NEW_TOKENS, len(prompts))]
    measured = per_answer([answer.text for answer in found], [answer.ended for answer in found])
    return {name: float(values.mean()) for name, values in measured.items()}


def base_answers(run: Path) -> dict[str, float]:
    from fitness_dpo.config import TrainConfig
    from fitness_dpo.runs import load_config

    return answers(load_config(run, TrainConfig), run, adapted=False)


def sound(row: dict[str, Any], base: dict[str, float]) -> bool:
    """Whether answers end at least as often as the base's, repeat themselves no more, and are about as long."""
    like = abs(row["words"] / base["words"] - 1) <= 0.15
    return bool(row["ended"] >= base["ended"] and row["repeated_4grams"] <= base["repeated_4grams"] and like)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("recipe"))
    parser.add_argument("--override", action="append", default=[], help="for every run, such as data.max_rows=16")
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    runs = [options.output / f"candidate-{number}" for number in range(len(CANDIDATES))]
    with ProcessPoolExecutor(options.at_once, multiprocessing.get_context("spawn"), prepare) as pool:
        rows = list(pool.map(train, [[*candidate, *options.override] for candidate in CANDIDATES], runs))
        base = pool.submit(base_answers, runs[0]).result()
        (options.output / "sweep.json").write_text(json.dumps({"base": base, "candidates": rows}, indent=1))
        print(f"base {base}", flush=True)
        ranked = sorted(
            range(len(rows)),
            key=lambda place: (not sound(rows[place], base), -rows[place]["accuracy"], rows[place]["loss"]),
        )
        for row in (rows[place] for place in ranked):
            print(
                f"{row['accuracy']:.3f} {row['margin']:7.2f} chosen {row['chosen_change']:+6.1f} likelier {row['chosen_likelier']:.3f} "
                f"ended {row['ended']:.3f} repeated {row['repeated_4grams']:.3f} words {row['words']:5.1f}  {row['overrides']}",
                flush=True,
            )
        best = [*CANDIDATES[ranked[0]], *options.override]
        seeds = [options.output / f"seed-{seed}" for seed in (1, 2, 3)]
        list(pool.map(train, [[*best, f"dpo.seed={seed}"] for seed in (1, 2, 3)], seeds))
    command = [sys.executable, "-m", "fitness_dpo.evaluate", f"max_new_tokens={NEW_TOKENS}", "batch_size=128"]
    measuring = [subprocess.Popen([*command, f"run={run}"]) for run in seeds]
    if any(each.wait() for each in measuring):
        sys.exit("an evaluation failed; see above")


if __name__ == "__main__":
    main()
