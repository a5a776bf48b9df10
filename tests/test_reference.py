"""Reference log-probabilities on disk: computed once, shared by what may share them, recomputed when they are damaged."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fitness_dpo.config import TrainConfig
from fitness_dpo.data import load_preferences
from fitness_dpo.model import Policy
from fitness_dpo.reference import Logps, Pair, reference_logps
from fitness_dpo.trainer import build_trainer
from tests.test_trainer import logps

Tiny = Callable[..., tuple[TrainConfig, Policy]]
PAIRS: list[Pair] = [{"prompt_ids": [1], "chosen_ids": [n], "rejected_ids": [2]} for n in (3, 4, 5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, with the models of the common one."""
    from fitness_dpo.weights import cache_folder

    (tmp_path / "cache").mkdir()
    (cache_folder() / "models").mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache" / "models").symlink_to(cache_folder() / "models")
    monkeypatch.setenv("FITNESS_DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def trainer_of(tiny: Tiny, pairs_file: Path, tmp_path: Path, *overrides: str) -> tuple[Any, list[int]]:
    """A trainer, and how many pairs went through the reference's forward pass to build it."""
    config, policy = tiny(f"data.path={pairs_file}", *overrides)
    passed: list[int] = []
    embeddings = policy.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda *_: passed.append(torch.is_grad_enabled()))
    trainer = build_trainer(config, policy, load_preferences(config.data).splits, tmp_path, [])
    handle.remove()
    return trainer, passed


def test_nine_runs_of_a_sweep_pay_for_one_reference_pass(tiny: Tiny, pairs_file: Path, tmp_path: Path) -> None:
    passes = []
    for beta in (0.05, 0.1, 0.3):
        for number, rest in enumerate((("lora.r=4",), ("lora.r=8", "dpo.seed=5"), ("dpo.learning_rate=1e-3",))):
            run = tmp_path / f"{beta}-{number}"
            _, passed = trainer_of(tiny, pairs_file, run, f"dpo.beta={beta}", "dpo.max_steps=null", *rest)
            passes.append(len(passed))
    assert passes[0] > 0
    assert passes[1:] == [0] * 8


@pytest.mark.parametrize("forward", ["packed", "padded"])
def test_what_is_kept_is_the_base_models_log_probability(
    tiny: Tiny, pairs_file: Path, tmp_path: Path, forward: str
) -> None:
    trainer, _ = trainer_of(tiny, pairs_file, tmp_path, f"dpo.forward={forward}")
    policy = Policy(trainer.model.eval(), trainer.processing_class)
    for row in trainer.train_dataset:
        for side in ("chosen", "rejected"):
            assert row[f"ref_{side}_logps"] == pytest.approx(logps(policy, row, side), rel=1e-5)


@pytest.mark.parametrize("change", ["lora.init=pissa", "lora.init=orthogonal", "dpo.forward=padded"])
def test_another_reference_is_computed_anew(tiny: Tiny, pairs_file: Path, tmp_path: Path, change: str) -> None:
    trainer_of(tiny, pairs_file, tmp_path)
    trainer, passed = trainer_of(tiny, pairs_file, tmp_path, change)
    assert passed
    policy = Policy(trainer.model.eval(), trainer.processing_class)  # untrained still: the reference itself
    row = trainer.train_dataset[0]
    assert row["ref_chosen_logps"] == pytest.approx(logps(policy, row, "chosen"), rel=1e-5)


def test_changed_weights_are_another_base(tiny: Tiny, pairs_file: Path, tmp_path: Path) -> None:
    trainer_of(tiny, pairs_file, tmp_path)
    config, policy = tiny(f"data.path={pairs_file}")
    policy.model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] += 1e-3
    before = set((tmp_path / "cache" / "reference").iterdir())
    build_trainer(config, policy, load_preferences(config.data).splits, tmp_path, [])
    assert set((tmp_path / "cache" / "reference").iterdir()) > before


def counted(calls: list[int]) -> Callable[[list[Pair]], list[Logps]]:
    def compute(pairs: list[Pair]) -> list[Logps]:
        calls.append(len(pairs))
        return [Logps(-float(pair["chosen_ids"][0]), -2.0) for pair in pairs]

    return compute


def test_a_changed_row_costs_one_row() -> None:
    calls: list[int] = []
    reference_logps("base", PAIRS, counted(calls))
    changed: list[Pair] = [PAIRS[2], {"prompt_ids": [1], "chosen_ids": [9], "rejected_ids": [2]}, PAIRS[0]]
    assert reference_logps("base", changed, counted(calls)) == [Logps(-5, -2), Logps(-9, -2), Logps(-3, -2)]
    assert calls == [3, 1]


@pytest.mark.parametrize("harm", [lambda content: content[:-3], lambda content: content[:20] + b"\x00" + content[21:]])
def test_a_damaged_file_is_computed_anew(cache: Path, harm: Callable[[bytes], bytes]) -> None:
    calls: list[int] = []
    reference_logps("base", PAIRS, counted(calls))
    (file,) = (cache / "reference" / "base").glob("*.msgpack")
    file.write_bytes(harm(file.read_bytes()))
    assert reference_logps("base", PAIRS, counted(calls))[0] == Logps(-3, -2)
    assert calls == [3, 3]


def ask_slowly(cache: str, results: Any) -> None:
    import os
    import time

    os.environ["FITNESS_DPO_CACHE"] = cache

    def compute(pairs: list[Pair]) -> list[Logps]:
        results.put("computed")
        time.sleep(0.5)
        return [Logps(-1.0, -2.0) for _ in pairs]

    assert len(reference_logps("base", PAIRS, compute)) == 3


def test_of_processes_that_ask_at_once_one_computes(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=ask_slowly, args=(str(cache), results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert results.get() == "computed"
    assert results.empty()
