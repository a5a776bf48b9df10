"""Optuna over a launcher that answers at once: what it is told, what it finds, and how a search goes on."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus

from fitness_dpo import search
from fitness_dpo.config import InputError
from fitness_dpo.jobs import Job
from fitness_dpo.leaderboard import values_of
from tests.test_leaderboard import displace

SETTINGS: dict[str, Any] = {"n_trials": 30, "n_jobs": 1, "objectives": ["accuracy"], "seed": 0}


class Landscape:
    """Runs that end at once, with an accuracy that is highest at beta 0.1; a rank of 4 fails, of 8 is displaced, of 2 stopped early."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tried: list[dict[str, str]] = []

    def launch(self, overrides: list[list[str]], first: int) -> Sequence[JobReturn]:
        answers = []
        for number, words in enumerate(overrides, first):
            values = values_of(words)
            self.tried.append(values)
            run = self.folder / str(number)
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(f"dpo:\n  beta: {values['dpo.beta']}\n")
            accuracy = 0.9 - abs(float(values["dpo.beta"]) - 0.1) if float(values["dpo.beta"]) < 0.4 else float("nan")
            after = {"eval_rewards/accuracies": accuracy, "eval_rewards/margins": 1.0, "eval_rewards/chosen": 0.0}
            rows = {"validation": 77, "too_long": {"validation": 0}}
            seconds = 100 * float(values["dpo.beta"])
            metrics = {"after": after, "rows": rows, "seconds": seconds, "peak_memory_gib": 1.0}
            (run / "metrics.json").write_text(json.dumps(metrics))
            if values.get("lora.r") == "8":
                displace(run)
            failed = values.get("lora.r") == "4"
            job = Job(number=number, setting=number, overrides=words, folder=run, state="finished")
            if values.get("lora.r") == "2":
                (run / "metrics.json").unlink()
                job.state = "stopped"
            answer = JobReturn(overrides=words, status=JobStatus.FAILED if failed else JobStatus.COMPLETED)
            answer.return_value = RuntimeError("killed by SIGKILL") if failed else [job]
            answers.append(answer)
        record = {
            "overrides": [], "hydra": [],
            "jobs": [
                {"number": n, "setting": n, "folder": str(n), "overrides": [f"{k}={v}" for k, v in values.items()], "state": "finished", "reason": None}
                for n, values in enumerate(self.tried)
            ],
        }  # fmt: skip
        (self.folder / "sweep.json").write_text(json.dumps(record))
        return answers


def run(folder: Path, *words: str, **settings: Any) -> tuple[list[dict[str, Any]], Landscape, list[dict[str, Any]]]:
    landscape = Landscape(folder)
    overrides = OverridesParser.create().parse_overrides(list(words))
    best = search.search(overrides, landscape.launch, folder, **SETTINGS | settings)
    return best, landscape, json.loads((folder / "search.json").read_text())["trials"]


def test_it_finds_the_best_beta_and_keeps_what_is_not_swept(tmp_path: Path) -> None:
    (best,), landscape, _ = run(tmp_path, "dpo.beta=tag(log, interval(0.01, 1.0))", "model=tiny")
    assert best["settings"]["dpo.beta"] == pytest.approx(0.1, abs=0.03)
    assert all(values["model"] == "tiny" for values in landscape.tried)


def test_failed_trials_nan_and_displacement_are_told(tmp_path: Path) -> None:
    (best,), _, trials = run(tmp_path, "dpo.beta=interval(0.05, 0.5)", "lora.r=2,4,8,16", n_trials=40, n_jobs=4)
    for trial in trials:
        beta, r = trial["settings"]["dpo.beta"], trial["settings"]["lora.r"]
        expected = "fail" if r == "4" else "pruned" if r in ("2", "8") else "fail" if beta >= 0.4 else "complete"
        assert trial["state"] == expected
    assert best["settings"]["lora.r"] == "16"


@pytest.mark.parametrize("words", ["dpo.beta=interval(0.3, 0.1)", "dpo.beta=tag(log, interval(0, 0.1))"])
def test_an_interval_that_cannot_be_drawn_from_is_one_line(words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(words) + ": a"):
        run(tmp_path, words)


def test_a_range_may_go_down(tmp_path: Path) -> None:
    _, landscape, _ = run(tmp_path, "dpo.beta=0.1", "lora.r=range(16,4,-4)", n_trials=12)
    assert {values["lora.r"] for values in landscape.tried} == {"8", "12", "16"}


def test_several_objectives_end_in_trade_offs(tmp_path: Path) -> None:
    best, _, trials = run(tmp_path, "dpo.beta=interval(0.01, 0.3)", objectives=["accuracy", "seconds"])
    finished = [trial["values"] for trial in trials]
    undominated = [
        [accuracy, seconds] for accuracy, seconds in finished
        if not any(a >= accuracy and s <= seconds and [a, s] != [accuracy, seconds] for a, s in finished)
    ]  # fmt: skip
    assert sorted(each["values"] for each in best) == sorted(undominated)


def test_a_resumed_search_begins_with_the_trials_it_has(tmp_path: Path) -> None:
    words = ["dpo.beta=tag(log, interval(0.01, 0.3))", "lora.r=16,32"]
    _, first, _ = run(tmp_path, *words, n_trials=5)
    _, again, _ = run(tmp_path, *words, n_trials=8, seed=1)
    assert again.tried[:5] == first.tried
    assert len(again.tried) == 8
