"""Every mistake a user makes ends in one line that names the key or file, the value and the mend."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import PAIRS, TINY, run_verb


def one_line(verb: str, *arguments: str, cwd: Path) -> str:
    done = run_verb(verb, *arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(cwd.rglob("config.yaml")), "nothing half-written"
    return done.stderr


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.json", None, "no such file; check the path"),
        ("empty.json", b" \n", "the file is empty"),
        ("prose.json", b"Squats are good.", "line 1: not JSON"),
        ("cut.json", b'[{"question": "a"', "not JSON"),
        ("cut.jsonl", b'{"question": "a", "chosen": "b", "rejected": "c"}\n{"ques', "line 2: not JSON"),
        ("lfs.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
        ("utf16.json", json.dumps(PAIRS).encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("latin1.json", '[{"question": "Café?"}]'.encode("latin-1"), "is not UTF-8"),
        ("keys.json", b'[{"ask": "a", "answer": "b"}]', "one answer each, none rejected (columns found: answer, ask)"),
        (
            "ties.json",
            b'[{"question": "a", "chosen": "b", "rejected": "b"}]',
            "no usable row of 1: 1 chosen equals rejected",
        ),
        ("number.json", b"3", "line 1: not JSON"),
    ],
)
def test_a_file_that_holds_no_pairs(name: str, content: bytes | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = one_line("train", f"data.path={name}", cwd=tmp_path)
    assert name in line
    assert expected in line


@pytest.mark.parametrize("key", ["ties", "duplicates"])
def test_a_row_made_an_error_is_named(key: str, tmp_path: Path) -> None:
    bad = PAIRS[0] if key == "duplicates" else PAIRS[0] | {"rejected": PAIRS[0]["chosen"]}
    (tmp_path / "pairs.json").write_text(json.dumps([*PAIRS, bad]))
    line = one_line("train", "data.path=pairs.json", f"data.{key}=error", cwd=tmp_path)
    assert "pairs.json row 17" in line
    assert f"data.{key}=drop" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.name=nobody/nothing"], "nobody/nothing: neither cached nor reachable on the hub"),
        (["model.name=nobody/nothing"], "model=smollm2_135m"),
        (["model.name=./nowhere"], "no such folder; check the path"),
        (["model.name=embedded:gpt5"], "choose one of embedded:smollm2-135m-instruct"),
        (["model=tiny", "model.dtype=float16"], "a CPU computes it slowly"),
        (["resume=latest"], "no interrupted run with a checkpoint there"),
        (["dpo.loss_type=[exo_pair]"], "exo_pair wants more than 0"),
    ],
)
def test_a_run_that_cannot_start(arguments: list[str], expected: str, pairs_file: Path, tmp_path: Path) -> None:
    assert expected in one_line("train", *TINY[1:], f"data.path={pairs_file}", *arguments, cwd=tmp_path)


@pytest.mark.parametrize("backend", ["unsloth", "transformers"])
def test_4bit_where_bitsandbytes_does_not_run(backend: str, pairs_file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bitsandbytes.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    done = run_verb(
        "train", "model=tiny", f"model.backend={backend}", "model.load_in_4bit=true", f"data.path={pairs_file}",
        cwd=tmp_path, PYTHONPATH=str(tmp_path / "broken"),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "model.load_in_4bit=true: bitsandbytes does not run here (libcudart.so.13: cannot open)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_infer_without_a_run_or_a_question(tmp_path: Path) -> None:
    assert "no finished run under" in one_line("infer", "prompt=Hello", cwd=tmp_path)
    assert "no config.yaml there" in one_line("infer", "prompt=Hello", "run=nowhere", cwd=tmp_path)
    assert "there is no question" in one_line("infer", cwd=tmp_path)
    assert "there is no question" in one_line("infer", "prompt= ", cwd=tmp_path)
    both = ["prompt=Hello", "run=nowhere", "model.name=embedded:tiny"]
    assert "answers without a run; leave one of them out" in one_line("infer", *both, cwd=tmp_path)


def test_infer_with_an_adapter_that_is_missing_or_does_not_fit(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "elsewhere" / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    arguments = [f"run={run}", "prompt=Hello", "sampling.max_new_tokens=2"]
    for file in (run / "adapter").glob("*.safetensors"):
        file.unlink()
    done = run_verb("infer", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no adapter_model.safetensors there" in done.stderr

    shutil.copytree(trained / "adapter", run / "adapter", dirs_exist_ok=True)
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("embedded:tiny", "embedded:smollm2-135m-instruct"))
    done = run_verb("infer", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "made for embedded:tiny, which is not the shape of model.name=embedded:smollm2-135m-instruct" in done.stderr
