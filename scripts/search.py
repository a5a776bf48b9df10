"""Search beta and learning rate on the validation split, then put the winner and the default side by side on the test split.

    python scripts/search.py --trials 20 -- model=smollm2_135m

Prints a table of both. Run again with the same words, it goes on where it stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HOME = Path("outputs/multirun")
SPACE = ["dpo.beta=tag(log, interval(0.02, 0.5))", "dpo.learning_rate=tag(log, interval(2e-5, 5e-4))"]
QUIET = ["logging.wandb.mode=disabled", "logging.sample_steps=null", "logging.sample_prompts=[]"]
FRESH_SEEDS = "dpo.seed=101,102,103"


def sweep(folder: Path, *words: str) -> None:
    resume = [f"sweep.resume={folder}"] if (folder / "sweep.json").is_file() else []
    command = [
        sys.executable, "-m", "fitness_dpo.train", "-m", f"hydra.sweep.dir={folder}", *words, *QUIET, *resume,
    ]  # fmt: skip
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def search(folder: Path, trials: int, at_once: int, words: list[str]) -> list[str]:
    """The settings of the best trial on the validation split."""
    optuna = ["hydra/sweeper=optuna", f"hydra.sweeper.n_trials={trials}", f"hydra.sweeper.n_jobs={at_once}"]
    sweep(folder, *optuna, *SPACE, f"sweep.at_once={at_once}", *words)
    found = json.loads((folder / "search.json").read_text(encoding="utf-8"))["best"][0]
    winner = [f"{name}={value}" for name, value in found["settings"].items()]
    print(f"winner of {trials} trials: {' '.join(winner)}, validation accuracy {found['values'][0]:.3f}")
    return winner


def evaluate(run: Path) -> dict[str, Any]:
    file = run / "evaluation" / "metrics.json"
    if not file.is_file():
        subprocess.run([sys.executable, "-m", "fitness_dpo.evaluate", f"run={run}"], check=True)
    measured: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return measured


def cell(values: list[float], form: str) -> str:
    each = ", ".join(format(value, form) for value in values)
    return f"{format(statistics.fmean(values), form)} ({each})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--name", default="search", help="folder under outputs/multirun")
    parser.add_argument(
        "--winner", default="", help="settings to compare with the default, instead of searching for them"
    )
    parser.add_argument("words", nargs="*", help="overrides of every run")
    parser.add_argument("--at-once", type=int, default=1)
    options = parser.parse_args()
    home, at_once = HOME / options.name, f"sweep.at_once={options.at_once}"
    winner = options.winner.split() or search(home / "trials", options.trials, options.at_once, options.words)
    sweep(home / "winner", FRESH_SEEDS, *winner, at_once, *options.words)
    sweep(home / "default", FRESH_SEEDS, at_once, *options.words)
    runs = [home / name / str(job) for name in ("winner", "default") for job in range(3)]
    with ThreadPoolExecutor(options.at_once) as pool:
        every = list(pool.map(evaluate, runs))
    print("\n| settings | test accuracy | margin | chosen change | quiz |\n|---|---|---|---|---|")
    for name, words, measured in (("winner", " ".join(winner), every[:3]), ("default", "", every[3:])):
        columns = [
            cell([each["preference"]["accuracy"]["value"] for each in measured], ".3f"),
            cell([each["preference"]["margin"]["value"] for each in measured], ".2f"),
            cell([each["preference"]["chosen_change"]["value"] for each in measured], "+.2f"),
            cell([each["quiz"]["tuned"]["raw"]["value"] for each in measured], ".3f"),
        ]
        print(f"| {name} {words} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
