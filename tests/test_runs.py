"""The verbs from the command line: what a run leaves behind, and what can be done with it afterwards."""

import importlib
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from fitness_dpo import runs
from fitness_dpo.checkpoints import Checkpoints
from fitness_dpo.interruption import Interruption
from fitness_dpo.manifest import seal
from tests.conftest import TINY, read_json, run_verb

LOGGED = {
    "loss", "grad_norm", "learning_rate", "entropy", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected",
}  # fmt: skip


def test_a_run_folder_holds_what_is_needed_to_repeat_it(trained: Path) -> None:
    metrics, record = read_json(trained / "metrics.json"), read_json(trained / "versions.json")
    steps = [entry for entry in metrics["history"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(entry.keys() >= LOGGED for entry in steps)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-6), "the policy starts as the reference"
    assert metrics["rows"] == {
        "read": 16, "dropped": {}, "too_long": {"train": 0, "validation": 0}, "train": 10, "validation": 4, "test": 2,
    }  # fmt: skip
    assert set(record["dataset"]) == {"train", "validation", "test"}
    assert record["packages"]["trl"].startswith("1.15")
    samples = (trained / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 6, "three questions before and after"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (trained / "adapter" / name).is_file()
    assert not list((trained / "adapter").glob("ref*")), "the reference is no part of what was learned"


def test_the_same_seed_gives_the_same_numbers(trained: Path, pairs_file: Path, tmp_path: Path) -> None:
    again = run_verb("train", *TINY, f"data.path={pairs_file}", "dpo.logging_steps=1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    (run,) = (tmp_path / "outputs").glob("*/*")
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained, run))
    assert all((first[name] == second[name]).all() for name in first)


def test_infer_answers_from_the_newest_run_and_from_standard_input(trained: Path) -> None:
    home = trained.parents[2]
    question = """I'm 62 (no "gym", 2,5 kg bands); can I squat = fine!"""
    asked = run_verb("infer", f"prompt={question}", "sampling.max_new_tokens=8", cwd=home)
    piped = run_verb("infer", "sampling.max_new_tokens=8", cwd=home, stdin=f"{question}\n")
    assert asked.returncode == piped.returncode == 0, asked.stderr + piped.stderr
    assert asked.stdout == piped.stdout != ""
    assert list(home.iterdir()) == [home / "outputs"], "asking leaves nothing behind"


def test_infer_asks_an_untuned_model_by_name(tmp_path: Path) -> None:
    done = run_verb("infer", "model.name=embedded:tiny", "prompt=Hello", "sampling.max_new_tokens=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_interrupted_run_goes_on_to_the_same_end(trained: Path, pairs_file: Path, tmp_path: Path) -> None:
    """A run whose end is cut off, back to its first checkpoint, ends with the adapter it had."""
    arguments = [*TINY, f"data.path={pairs_file}", "dpo.save_steps=1", "dpo.logging_steps=1"]
    whole = run_verb("train", *arguments, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    (run,) = (tmp_path / "outputs").glob("*/*")
    finished = load_file(run / "adapter" / "adapter_model.safetensors")
    for leftover in (run / "adapter", run / "checkpoints" / "checkpoint-2"):
        shutil.rmtree(leftover)
    (run / "metrics.json").unlink()

    resumed = run_verb("train", "resume=latest", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all((finished[name] == again[name]).all() for name in finished)
    history = read_json(run / "metrics.json")["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 6
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_offline_wandb_run_holds_the_curves_and_the_samples(trained: Path) -> None:
    records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    (file,) = trained.glob("wandb/offline-run-*/run-*.wandb")
    keys: set[str] = set()
    for content in wandb_records(file):
        record = records.Record()
        record.ParseFromString(content)
        keys |= {item.key or "/".join(item.nested_key) for item in record.history.item}
    assert {f"train/{name}" for name in LOGGED} | {"eval/rewards/margins"} <= keys
    (table,) = trained.glob("wandb/offline-run-*/files/media/table/samples_[1-9]*.json")
    assert len(read_json(table)["data"]) == 6


def wandb_records(file: Path) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format, 7 bytes of header in 32 KiB blocks after 7 bytes of file header."""
    data, position, found, part = file.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
    return found


def test_the_embedded_model_learns_the_pairs_it_sees(pairs_file: Path, tmp_path: Path) -> None:
    """Real weights through Unsloth's CPU backend: three steps on the same two pairs, then an answer from them."""
    done = run_verb(
        "train", "model=smollm2_135m", f"data.path={pairs_file}", "data.max_rows=2", "data.validation_size=0",
        "data.test_size=0", "dpo.batch_size=2", "dpo.gradient_accumulation_steps=1", "dpo.epochs=3",
        "dpo.learning_rate=1e-3", "dpo.warmup_ratio=0", "dpo.logging_steps=1", "logging.sample_prompts=[]",
        "logging.wandb.mode=disabled", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs").glob("*/*")
    losses: list[Any] = [entry["loss"] for entry in read_json(run / "metrics.json")["history"] if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=0.05), "bfloat16 rounds a sum of log-probabilities"
    assert losses[2] < losses[0] - 0.1
    asked = run_verb("infer", "prompt=How do I squat?", "sampling.max_new_tokens=5", cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()


def test_a_run_that_is_training_is_not_joined(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "2026-01-01" / "00-00-00"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("wandb"))
    (run / "metrics.json").unlink()
    with runs.held(run):
        done = run_verb("train", "resume=latest", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("that run is training still; wait for its end, or stop it first\n")
    assert done.stderr.count("\n") == 1


def test_the_checkpoint_just_written_outlives_a_later_one_that_was_cut_off(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(bytes(step))
        if step < 3:
            seal(folder)
    state = TrainerState(global_step=2, max_steps=9)
    Checkpoints(Interruption(), tmp_path, 1).on_save(TrainingArguments(str(tmp_path)), state, TrainerControl())
    last = runs.last_checkpoint(tmp_path)
    assert last is not None
    assert last.name == "checkpoint-2"
    assert not (tmp_path / "checkpoints" / "checkpoint-1").exists()


def test_a_run_without_validation_rows_is_resumed(trained: Path, pairs_file: Path, tmp_path: Path) -> None:
    words = ["data.validation_size=0", "dpo.eval_steps=1", "dpo.save_steps=1", "logging.wandb.mode=disabled"]
    done = run_verb("train", *TINY, *words, f"data.path={pairs_file}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs").glob("*/*")
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    resumed = run_verb("train", "resume=latest", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
