"""python scripts/out_of_memory.py: provoke a real out-of-memory on the GPU, and show both lines of it.

Leaves a run of the tiny model 3 GiB of the GPU and gives it a batch that takes more. Prints the lines; fails where either is missing.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOM_GIB = 3
HOLD = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
block = torch.empty(max(free - int(float(sys.argv[1]) * 2**30), 0), dtype=torch.uint8, device="cuda")
print("holding", flush=True)
sys.stdin.read()
"""


def main() -> None:
    answer = "Keep your back straight and rest for two minutes between the sets. " * 22
    with tempfile.TemporaryDirectory() as home:
        pairs = Path(home) / "pairs.json"
        rows = [
            {"question": f"How do I squat, number {n}?", "chosen": f"{answer}{n} times.", "rejected": f"{answer}{n}."}
            for n in range(512)
        ]
        pairs.write_text(json.dumps(rows), encoding="utf-8")
        command = [
            sys.executable, "-m", "fitness_dpo.train", "model=tiny", "model.backend=transformers", f"data.path={pairs}",
            "data.duplicates=keep", "dpo.batch_size=384", "dpo.eval_batch_size=1", "dpo.max_steps=1", "dpo.compile=false",
            "model.max_length_tokens=2048", "model.dtype=bfloat16",
            "dpo.forward=padded", "data.validation_size=4", "data.test_size=2", "logging.wandb.mode=disabled", "logging.sample_prompts=[]",
        ]  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(ROOM_GIB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            assert holder.stdout is not None  # noqa: S101
            assert holder.stdout.readline() == "holding\n"  # noqa: S101
            done = subprocess.run(
                command, cwd=home, env=os.environ, capture_output=True, text=True, check=False, timeout=500
            )
            holder.communicate("")
    print(done.stderr)
    if done.returncode != 2 or "memory: a step" not in done.stderr or "out of memory on the GPU" not in done.stderr:
        raise SystemExit(f"expected both lines and exit status 2, not {done.returncode}\n{done.stdout[-2000:]}")


if __name__ == "__main__":
    main()
