"""python scripts/resume_check.py [override ...]: whether a run that was stopped and resumed ends as one that was not.

Trains the tiny model three times on the machine at hand: whole, whole once more, and stopped by SIGTERM half-way and resumed.
Prints a JSON object with the greatest distance from the first run of each logged loss and gradient norm and of the adapter, for the
second run (what this machine's kernels differ by themselves) and the resumed one. Fails where the resumed one is farther off than both twice
the second and NOISE.
"""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

STEPS, STOP = 24, 12
NOISE = {"loss": 2**-8, "grad_norm": 2**-8, "adapter": 2**-8}
"""bfloat16 rounds a number by up to 2**-9 of it. Gradient norms and the adapter are measured relative to the first run's."""
RECIPE = [
    "model=tiny", "model.dtype=bfloat16", f"dpo.max_steps={STEPS}", "dpo.batch_size=4", "dpo.gradient_accumulation_steps=1", "dpo.save_steps=1000",
    "dpo.logging_steps=1", "dpo.learning_rate=1e-3", "data.max_validation_rows=16", "logging.sample_prompts=[]", "logging.wandb.mode=disabled",
]  # fmt: skip


def train(home: Path, *arguments: str, stop: bool = False) -> Path:
    """The folder of the one run under `home`."""
    command = [sys.executable, "-m", "fitness_dpo.train", *arguments]
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # noqa: S101
        for line in process.stdout:
            if stop and line.startswith(f"step {STOP}/"):
                process.send_signal(signal.SIGTERM)
    if process.returncode != (128 + signal.SIGTERM if stop else 0):
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    (run,) = home.glob("outputs/*/*")
    return run


def distances(run: Path, first: Path) -> dict[str, float]:
    ours, theirs = (logged(folder) for folder in (run, first))
    if [entry["step"] for entry in ours] != [entry["step"] for entry in theirs]:
        raise SystemExit(f"{run}: logged other steps than {first}")
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, first)]
    apart = sum((adapters[0][name] - value).square().sum() for name, value in adapters[1].items())
    whole = sum(value.square().sum() for value in adapters[1].values())
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "loss": max(abs(our["loss"] - their["loss"]) for our, their in pairs),
        "grad_norm": max(abs(our["grad_norm"] / their["grad_norm"] - 1) for our, their in pairs),
        "adapter": float(apart / whole) ** 0.5,
    }


def logged(run: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["history"]
    return [entry for entry in history if "loss" in entry]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        homes = [Path(folder) / name for name in ("first", "second", "stopped")]
        for home in homes:
            home.mkdir()
        recipe = [*RECIPE, *sys.argv[1:]]
        first, second, stopped = (train(home, *recipe, stop=home.name == "stopped") for home in homes)
        (checkpoint,) = stopped.glob("checkpoints/checkpoint-*")
        if train(homes[2], "resume=latest") != stopped:
            raise SystemExit("resumed in another folder")
        results = {"second": distances(second, first), "resumed": distances(stopped, first)}
    passed = all(results["resumed"][key] <= max(2 * results["second"][key], NOISE[key]) for key in NOISE)
    print(json.dumps({"stopped_at": checkpoint.name, "steps": STEPS, **results, "passed": passed}, indent=1))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
