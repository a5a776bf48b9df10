"""python scripts/long_run.py [--minutes 30] [override ...]: whether memory, file handles and step time of a long run stay flat.

Trains over and over the rows of the overrides, looks at the process every five seconds, and prints a JSON object: for each
figure its median in the sixth minute and in the last, and the largest value in between.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

WARM_UP_MINUTES = 5
STEP = re.compile(r"step (\d+)/")


def look(pid: int) -> dict[str, float]:
    """Resident memory in MiB and open files of a process, by Linux's /proc."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    resident = re.search(r"VmRSS:\s+(\d+)", status)
    return {
        "resident_mib": int(resident[1]) / 1024 if resident else 0.0,
        "open_files": float(len(list(Path(f"/proc/{pid}/fd").iterdir()))),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    known, overrides = parser.parse_known_args()
    command = [
        sys.executable, "-m", "fitness_dpo.train", "dpo.epochs=100000", "dpo.logging_steps=1", "dpo.eval_steps=200",
        "logging.sample_steps=200", f"max_minutes={known.minutes}", *overrides,
    ]  # fmt: skip
    began = time.monotonic()
    seen: list[tuple[float, dict[str, float]]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            while process.poll() is None:
                try:
                    seen.append((time.monotonic() - began, look(process.pid)))
                except FileNotFoundError:
                    return
                time.sleep(5)

        threading.Thread(target=watch, daemon=True).start()
        last = began
        assert process.stdout is not None  # noqa: S101
        for line in process.stdout:
            if STEP.match(line) and "loss" in line:
                now = time.monotonic()
                seen.append((now - began, {"step_seconds": now - last}))
                last = now
    print(json.dumps({"status": process.returncode, **summary(seen, known.minutes)}, indent=1))


def summary(seen: list[tuple[float, dict[str, float]]], minutes: float) -> dict[str, dict[str, float]]:
    def median(key: str, start: float, end: float) -> float:
        values = [values[key] for at, values in seen if key in values and start * 60 <= at < end * 60]
        return round(statistics.median(values), 3) if values else float("nan")

    return {
        key: {
            "sixth_minute": median(key, WARM_UP_MINUTES, WARM_UP_MINUTES + 1),
            "last_minute": median(key, minutes - 1, minutes),
            "most": round(
                max((values[key] for at, values in seen if key in values and at >= WARM_UP_MINUTES * 60), default=0), 3
            ),
        }
        for key in ("resident_mib", "open_files", "step_seconds")
    }


if __name__ == "__main__":
    main()
