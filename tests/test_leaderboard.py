"""The ranking of a sweep: what ranks, what vetoes, and what the page shows in a browser."""

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import binomtest

from fitness_dpo import leaderboard
from tests.conftest import run_verb

Accuracies = dict[tuple[str, ...], float]


def write_sweep(folder: Path, accuracies: Accuracies, **metrics: object) -> Path:
    """A sweep whose jobs are the keys, overrides; None is a job that failed."""
    jobs = []
    for number, (overrides, accuracy) in enumerate(accuracies.items()):
        run = folder / str(number)
        run.mkdir(parents=True)
        beta = next((word.partition("=")[2] for word in overrides if word.startswith("dpo.beta=")), "0.1")
        (run / "config.yaml").write_text(f"dpo:\n  beta: {beta}\n")
        after = {"eval_rewards/accuracies": accuracy, "eval_rewards/margins": 0.5, "eval_rewards/chosen": -0.2}
        rows = {"validation": 80, "too_long": {"validation": 3}}
        known = {"after": after, "rows": rows, "seconds": 9.0, "peak_memory_gib": 1.0, **metrics}
        (run / "metrics.json").write_text(json.dumps(known))
        jobs.append({"number": number, "setting": number, "folder": str(number), "overrides": list(overrides), "state": "finished", "reason": None})  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps({"overrides": [], "hydra": [], "jobs": jobs}))
    return folder


def displace(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"verdicts": [{"name": "displacement", "sick": True}]}))


@pytest.mark.parametrize(("right", "count"), [(0, 77), (50, 77), (77, 77), (3, 4)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    reference = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert leaderboard.wilson(right / count, count) == pytest.approx((reference.low, reference.high), abs=1e-6)


def test_accuracy_ranks_and_displacement_vetoes(tmp_path: Path) -> None:
    accuracies: Accuracies = {("dpo.beta=0.05",): 0.9, ("dpo.beta=0.1",): 0.7, ("dpo.beta=0.5",): 0.8}
    folder = write_sweep(tmp_path / "sweep", accuracies)
    displace(folder / "0")
    board = leaderboard.rank(folder)
    assert [entry.settings["dpo.beta"] for entry in board.entries] == ["0.5", "0.1", "0.05"]
    assert board.entries[2].vetoed
    assert board.best == "python -m fitness_dpo.train dpo.beta=0.5"
    best = board.entries[0].figures
    assert best.rows == 77
    assert best.margin == pytest.approx(1.0)
    assert best.chosen_change == pytest.approx(-0.4)


def test_what_a_verdict_stopped_stands_last(tmp_path: Path) -> None:
    """Once with figures, once without: a training that exploded has none."""
    accuracies: Accuracies = {("dpo.beta=0.05",): 0.9, ("dpo.beta=0.1",): 0.7, ("dpo.beta=0.5",): 0.8}
    folder = write_sweep(tmp_path / "sweep", accuracies)
    record = json.loads((folder / "sweep.json").read_text())
    for job, verdict in ((0, "over-fitting"), (2, "explosion")):
        record["jobs"][job] |= {"state": "stopped", "reason": f"{verdict}: of this figure; try another"}
    (folder / "2" / "metrics.json").unlink()
    (folder / "sweep.json").write_text(json.dumps(record))
    board = leaderboard.publish(folder, Console(quiet=True))
    assert [entry.jobs for entry in board.entries] == [[1], [0], [2]]
    assert [entry.vetoed for entry in board.entries] == [False, True, True]
    assert not board.unfinished
    with (folder / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["accuracy"], row["sick"]) for row in rows] == [("0.7", ""), ("0.9", "over-fitting"), ("", "explosion")]


def test_seeds_of_a_setting_are_one_line(tmp_path: Path) -> None:
    accuracies: Accuracies = {
        ("lora.r=8", "dpo.seed=0"): 0.6, ("lora.r=8", "dpo.seed=1"): 0.7,
        ("lora.r=16", "dpo.seed=0"): 0.9, ("lora.r=16", "dpo.seed=1"): 0.3,
    }  # fmt: skip
    board = leaderboard.rank(write_sweep(tmp_path / "sweep", accuracies))
    assert [(entry.settings, entry.jobs) for entry in board.entries] == [
        ({"lora.r": "8"}, [0, 1]),
        ({"lora.r": "16"}, [2, 3]),
    ]
    assert [entry.figures.accuracy for entry in board.entries] == pytest.approx([0.65, 0.6])


def test_the_csv_holds_every_figure_and_text_is_escaped_on_the_page(tmp_path: Path) -> None:
    accuracies: Accuracies = {("dpo.beta=0.05", "data.path='<b>.json'"): 0.6, ("dpo.beta=0.1", "data.path='a,b'"): 0.7}
    folder = write_sweep(tmp_path / "sweep", accuracies)
    leaderboard.publish(folder, Console(quiet=True))
    with (folder / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dpo.beta"], row["data.path"], float(row["accuracy"])) for row in rows] == [
        ("0.1", "'a,b'", 0.7), ("0.05", "'<b>.json'", 0.6),
    ]  # fmt: skip
    page = (folder / "leaderboard.html").read_text()
    assert "<b>.json" not in page
    assert page.count("<svg") == 3, "one for each setting and one for both"


def test_the_verb_wants_a_sweep(tmp_path: Path) -> None:
    for argument, expected in ((), "sweep=latest: no sweep under"), (("sweep=.",), "sweep=.: no sweep.json there"):
        done = run_verb("leaderboard", *argument, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {expected}")
