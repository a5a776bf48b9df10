"""python scripts/resume_on_gpu.py [override ...]: does a run killed at a checkpoint and resumed agree with one that was not?

Trains twice, kills the second with SIGKILL once its checkpoint of step 6 is sealed, resumes it, and prints as JSON the losses of
every step of both and their largest difference. On a GPU they agree to the noise of bfloat16.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOLERANCE = 0.02  # nats, of losses near ln 2


def losses(home: Path) -> dict[int, float]:
    (metrics,) = home.glob("outputs/*/*/metrics.json")
    history = json.loads(metrics.read_text(encoding="utf-8"))["history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def main() -> None:
    command = [sys.executable, "-m", "fitness_dpo.train"]
    settings = [
        "model=tiny", "model.backend=transformers", "dpo.max_steps=12", "dpo.batch_size=4", "dpo.logging_steps=1",
        "dpo.save_steps=3", "dpo.learning_rate=1e-3", "dpo.eval_steps=null", "logging.wandb.mode=disabled",
        "logging.sample_prompts=[]", *sys.argv[1:],
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        for home in (whole, killed):
            home.mkdir()
        subprocess.run([*command, *settings], cwd=whole, check=True, stdout=sys.stderr)
        with subprocess.Popen([*command, *settings], cwd=killed, stdout=sys.stderr) as process:
            while not list(killed.glob("outputs/*/*/checkpoints/checkpoint-6/sha256.json")):
                if process.poll() is not None:
                    raise SystemExit("the run ended before it could be killed")
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
        subprocess.run([*command, "resume=latest"], cwd=killed, check=True, stdout=sys.stderr)
        first, second = losses(whole), losses(killed)
    apart = max(abs(first[step] - second[step]) for step in first)
    print(json.dumps({"whole": first, "resumed": second, "largest_difference": apart}, indent=1))
    if first.keys() != second.keys() or apart > TOLERANCE:
        raise SystemExit(f"the losses differ by {apart}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()
