"""Choose the embedded model's recipe on the validation split, then measure it on the test split over three seeds.

    python scripts/choose_recipe.py --at-once 16 --output recipe

Every run is a `python -m fitness_dpo.train` of the embedded set, side by side on one GPU. The candidate with the highest
held-out accuracy is trained anew with seeds 1, 2 and 3, and only those runs are shown the test split. recipe/sweep.json has the
candidates, recipe/seed-N/evaluation/metrics.json the measures.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

COMMON = [
    "model=smollm2_135m", "model.backend=transformers", "dpo.eval_batch_size=77", "logging.wandb.mode=disabled",
    "logging.sample_steps=null", "logging.sample_prompts=[]", "logging.console=false", "dpo.logging_steps=5",
]  # fmt: skip
SFT = ["dpo.loss_type=[sigmoid,sft]", "dpo.loss_weights=[1,0.2]"]
NORMALISED = ["dpo.loss_type=[sigmoid_norm]", "dpo.beta=5"]
CANDIDATES = [
    [f"dpo.learning_rate={rate}", f"dpo.epochs={epochs}", *more]
    for rate, epochs, more in (
        ("1e-4", 1, []), ("1e-4", 2, []), ("1e-4", 3, []), ("2e-4", 1, []), ("2e-4", 2, []), ("2e-4", 3, []), ("5e-4", 1, []), ("5e-4", 2, []),
        ("2e-4", 2, ["dpo.beta=0.05"]), ("2e-4", 2, ["dpo.beta=0.3"]), ("5e-4", 2, ["dpo.beta=0.3"]),
        ("2e-4", 2, SFT), ("5e-4", 2, SFT), ("2e-4", 2, ["lora.r=64", "lora.alpha=128"]), ("2e-4", 2, NORMALISED), ("5e-4", 2, NORMALISED),
    )
]  # fmt: skip


def train(overrides: list[str], run: Path) -> dict[str, Any]:
    """Train in this process, which was forked from one that has imported everything, and return the run's metrics."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from rich.console import Console

    from fitness_dpo.interruption import Interruption
    from fitness_dpo.train import train as train_run

    with initialize_config_module("fitness_dpo.conf", version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("config", overrides=[*COMMON, *overrides]))
    return train_run(config, run, Console(quiet=True), Interruption())


def train_all(wanted: list[tuple[list[str], Path]], at_once: int) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(train, *zip(*wanted, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("recipe"))
    parser.add_argument("--override", action="append", default=[], help="for every run, such as data.max_rows=16")
    options = parser.parse_args()
    from omegaconf import OmegaConf

    import fitness_dpo.callbacks
    import fitness_dpo.tracking
    import fitness_dpo.trainer  # noqa: F401
    from fitness_dpo import config as settings
    from fitness_dpo.weights import locate

    settings.register()
    OmegaConf.register_new_resolver("default_model", lambda: "smollm2_135m", replace=True)
    locate("embedded:smollm2-135m-instruct", None)
    options.output.mkdir(parents=True)
    names = [f"candidate-{number}" for number in range(len(CANDIDATES))]
    wanted = [
        ([*overrides, *options.override], options.output / name)
        for overrides, name in zip(CANDIDATES, names, strict=True)
    ]
    found = train_all(wanted, options.at_once)
    rows = [
        {
            "overrides": " ".join(overrides),
            **{name: metrics["after"][f"eval_{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen")},
            "beta": 0.1, "seconds": metrics["seconds"],
        }
        for overrides, metrics in zip(CANDIDATES, found, strict=True)
    ]  # fmt: skip
    (options.output / "sweep.json").write_text(json.dumps(rows, indent=1))
    ranked = sorted(range(len(rows)), key=lambda place: (-rows[place]["rewards/accuracies"], rows[place]["loss"]))
    for place in ranked:
        row = rows[place]
        print(
            f"{row['rewards/accuracies']:.3f} {row['rewards/margins']:7.3f} {row['loss']:7.3f}  {row['overrides']}",
            flush=True,
        )
    best = CANDIDATES[ranked[0]]
    seeds = [([*best, f"dpo.seed={seed}", *options.override], options.output / f"seed-{seed}") for seed in (1, 2, 3)]
    train_all(seeds, options.at_once)
    measuring = [
        subprocess.Popen([sys.executable, "-m", "fitness_dpo.evaluate", f"run={run}", "batch_size=128"])
        for _, run in seeds
    ]
    if any(each.wait() for each in measuring):
        sys.exit("an evaluation failed; see above")


if __name__ == "__main__":
    main()
