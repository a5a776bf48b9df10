"""Runs that are stopped: by a signal or a time limit, and then resumed to the numbers of a run that was not."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.conftest import TINY, read_json
from tests.preloaded import Trainings, preloaded

# dropout and two epochs: the random state and the order of the rows must come back too
LONG = [
    *TINY, "dpo.max_steps=null", "dpo.epochs=2", "dpo.batch_size=2", "dpo.gradient_accumulation_steps=2", "lora.dropout=0.1",
    "dpo.logging_steps=1", "dpo.save_steps=5", "dpo.eval_steps=2", "logging.sample_steps=2", "logging.wandb.mode=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    with preloaded(tmp_path_factory.mktemp("trainings")) as server:
        yield server


def the_run(home: Path) -> Path:
    (run,) = (home / "outputs").glob("*/*")
    return run


@pytest.fixture(scope="module")
def uninterrupted(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    home = tmp_path_factory.mktemp("whole")
    done = trainings.run(*LONG, f"data.path={pairs_file}", cwd=home)
    assert done.status() == 0, done.err
    return the_run(home)


def assert_same(run: Path, uninterrupted: Path) -> None:
    """The adapter, the samples and every logged figure but times are those of the run that was not stopped."""
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, uninterrupted))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert (run / "samples.jsonl").read_text() == (uninterrupted / "samples.jsonl").read_text()
    assert figures(run) == figures(uninterrupted)


def figures(run: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = read_json(run / "metrics.json")["history"]
    timed = ("runtime", "per_second", "flos", "train_loss", "num_tokens")
    return [{key: value for key, value in entry.items() if not any(word in key for word in timed)} for entry in history]


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 2), pytest.param(signal.SIGINT, 4, marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on_to_the_same_numbers(
    number: signal.Signals, step: int, trainings: Trainings, uninterrupted: Path, pairs_file: Path, tmp_path: Path
) -> None:
    home = tmp_path / "a b é"  # a path that neither a shell nor Hydra would rather see
    home.mkdir()
    stopped = trainings.start(*LONG, f"data.path={pairs_file}", cwd=home)
    stopped.wait_for(f"step {step}/")
    stopped.send(number)
    asked = time.monotonic()
    assert stopped.status() == 128 + number
    assert time.monotonic() - asked < 30
    run = the_run(home)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    at = int(stopped.err.split(" at step ")[1].split()[0])
    assert stopped.err == (
        f"stopped by {name} at step {at} of 6, saved up to step {at}; go on with: "
        f"python -m fitness_dpo.train resume=outputs/{run.parent.name}/{run.name}\n"
    )
    assert not (run / "metrics.json").exists()

    refused = trainings.run("resume=latest", "lora.r=8", "dpo.save_steps=5", cwd=home)
    assert refused.status() == 2
    assert "lora.r: 16 -> 8; leave this out, or allow it with allow_changes=[lora.r]" in refused.err
    assert "save_steps" not in refused.err

    resumed = trainings.run("resume=latest", "dpo.save_steps=4", "allow_changes=[dpo.save_steps]", cwd=home)
    assert resumed.status() == 0, resumed.err
    assert f"resume outputs/{run.parent.name}/{run.name}/checkpoints/checkpoint-{at}\n" in resumed.out
    assert_same(run, uninterrupted)


def test_a_time_limit_saves_and_says_how_to_go_on(
    trainings: Trainings, uninterrupted: Path, pairs_file: Path, tmp_path: Path
) -> None:
    stopped = trainings.run(*LONG, f"data.path={pairs_file}", "max_minutes=0.01", cwd=tmp_path)
    assert stopped.status() == 124, stopped.err
    assert re.match(r"stopped by max_minutes at step (\d) of 6, saved up to step \1; go on with: ", stopped.err), (
        stopped.err
    )
    resumed = trainings.run("resume=latest", "max_minutes=60", cwd=tmp_path)
    assert resumed.status() == 0, resumed.err
    assert_same(the_run(tmp_path), uninterrupted)


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_left(trainings: Trainings, tmp_path: Path) -> None:
    """A step of thousands of forward passes: a signal leaves it for the last checkpoint, a second Ctrl-C at once."""
    rows = [
        {"question": f"What is exercise {n}?", "chosen": f"Number {n}.", "rejected": f"Not {n}."} for n in range(6000)
    ]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    endless = [
        *LONG, "data.path=many.json", "data.duplicates=keep", "dpo.batch_size=1", "dpo.gradient_accumulation_steps=6000",
        "dpo.eval_steps=null", "dpo.precompute_reference=false", "data.max_validation_rows=4",
    ]  # fmt: skip
    runs = [trainings.start(*endless, cwd=tmp_path) for _ in range(2)]
    for run in runs:
        run.wait_for("step 0")
    time.sleep(5)
    for run in runs:
        run.send(signal.SIGINT)
    time.sleep(1.2)
    runs[1].send(signal.SIGINT)
    asked = time.monotonic()
    assert runs[1].status() == 130, runs[1].err
    assert time.monotonic() - asked < 2
    assert runs[1].err == "stopped at once\n"
    assert runs[0].status() == 130
    assert time.monotonic() - asked < 30
    assert runs[0].err == "stopped by Ctrl-C at step 0 of 2, before the first checkpoint; start again\n"


def test_a_signal_before_the_first_step_leaves_nothing(trainings: Trainings, pairs_file: Path, tmp_path: Path) -> None:
    stopped = trainings.start(*LONG, f"data.path={pairs_file}", cwd=tmp_path)
    stopped.wait_for("model")
    stopped.send(signal.SIGTERM)
    assert stopped.status() == 143
    assert stopped.err == "stopped before the first step; nothing was lost\n"
    assert not list((tmp_path / "outputs").glob("*/*"))
