"""Two processes train one model: the numbers of one process at the same global batch, and one run folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import TINY, read_json, run_verb


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_json(run / "metrics.json")["history"] if "loss" in entry]


@pytest.mark.slow
def test_two_processes_train_as_one_does(pairs_file: Path, tmp_path: Path) -> None:
    shared = [
        *TINY,
        f"data.path={pairs_file}",
        "dpo.batch_size=1",
        "dpo.logging_steps=1",
        "dpo.learning_rate=1e-3",
        "dpo.warmup_ratio=0",
    ]
    alone = run_verb("train", *shared, "dpo.gradient_accumulation_steps=4", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert alone.returncode == 0, alone.stderr
    (one,) = (tmp_path / "outputs").glob("*/*")
    home = tmp_path / "two"
    home.mkdir()
    cache = home / "cache"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    together = subprocess.run(
        [*launcher, "fitness_dpo.train", *shared, "dpo.gradient_accumulation_steps=2"], cwd=home, capture_output=True,
        text=True, check=False, timeout=400,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "FITNESS_DPO_CACHE": str(cache)},
    )  # fmt: skip
    assert together.returncode == 0, together.stderr
    (two,) = (home / "outputs").glob("*/*")
    assert len(list(cache.glob("reference/*/*.msgpack"))) == 2, "one process computes the reference of each split"
    assert len(set(losses(one))) == 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
    before, after = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert all(before[name].allclose(after[name], atol=1e-5) for name in before)
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        assert read_json(two / "metrics.json")["after"][name] == pytest.approx(
            read_json(one / "metrics.json")["after"][name], abs=1e-6
        )
    for name, expected in read_json(one / "metrics.json")["held_out_pairs"].items():
        assert len(expected) == 4
        assert read_json(two / "metrics.json")["held_out_pairs"][name] == pytest.approx(expected, abs=1e-4)
    assert (two / "report.html").is_file()
    assert len(list(two.glob("wandb/offline-run-*"))) == 1
    assert len((two / "samples.jsonl").read_text().splitlines()) == 6
    assert together.stdout.count("held-out accuracy") == 1, "only the first process speaks"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["data.path=nothing.json", "dpo.micro_batch_tokens=200"])
def test_a_mistake_is_said_once(mistake: str, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*launcher, "fitness_dpo.train", *TINY, mistake], cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=400, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count(f"error: {mistake}:") == 1
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("number", ["0", "1"])
def test_every_process_says_that_its_own_gpu_is_full(number: str, tmp_path: Path) -> None:
    """torch's own error out of a verb; no GPU is here to fill."""
    code = """
import sys, torch
from fitness_dpo.cli import verb
from fitness_dpo.config import ReportConfig
def full(config, folder):
    raise torch.OutOfMemoryError("CUDA out of memory")
sys.argv = ["report"]
verb("report", ReportConfig, full)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"RANK": number},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: out of memory on the GPU: lower batch_size")
    assert done.stderr.count("\n") == 1
