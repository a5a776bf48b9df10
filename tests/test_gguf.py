"""GGUF and Ollama exports, written by llama.cpp's converter and asked through llama.cpp. Slow: make test-export."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fitness_dpo import runs
from fitness_dpo.config import TrainConfig
from fitness_dpo.model import load_policy, save_adapter
from fitness_dpo.weights import locate
from tests.conftest import run_verb

pytest.importorskip("llama_cpp", reason="make llama builds it")
pytestmark = pytest.mark.slow
FORMATS = ("f16", "q8_0", "q4_k_m")


@pytest.fixture(scope="module")
def run(compose_train: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over a Llama of random weights with SmolLM2's tokenizer: llama.cpp knows no other of ours."""
    home = tmp_path_factory.mktemp("gguf")
    tokenizer: Any = AutoTokenizer.from_pretrained(locate("embedded:smollm2-135m-instruct", None))
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.05,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(settings).bfloat16().save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    config = compose_train("model=tiny", f"model.name={home / 'base'}")
    policy = load_policy(config.model, config.lora, 0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    folder = home / "run"
    runs.write_start(folder, config, runs.provenance({}) | {"wandb_id": "0123abcd"})
    save_adapter(policy, config.model.name, folder / runs.ADAPTER)
    metrics = {"steps": 1, "after": None, "rows": {"train": 1, "validation": 0, "test": 0}}
    (folder / runs.METRICS).write_text(json.dumps(metrics))
    return folder


def export(run: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_verb("export", f"run={run}", "parity.max_new_tokens=16", *arguments, cwd=run.parent)


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_gguf_file_answers_as_the_adapter_does(run: Path, quantization: str) -> None:
    done = export(run, "format=gguf", f"quantization={quantization}", "parity.required=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"gguf, {quantization}" in done.stdout
    folder = run / "export" / f"gguf-{quantization}"
    assert {file.name for file in folder.iterdir()} == {f"base-dpo.{quantization}.gguf", "README.md", "export.json"}


def test_a_file_that_answers_otherwise_is_refused(run: Path) -> None:
    done = export(run, "format=gguf", "quantization=q4_k_m", "output=far", "parity.thresholds.q4_k_m=0.01")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "gguf, q4_k_m differs from the adapter by up to" in done.stderr
    assert not list(run.parent.glob("*far*"))


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(trained: Path, tmp_path: Path) -> None:
    done = run_verb("export", f"run={trained}", "format=gguf", "output=gguf", "parity.max_new_tokens=2", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "llama.cpp's converter cannot convert this model" in done.stderr
    assert not list(tmp_path.iterdir())


GO = """package main

import ("encoding/json"; "os"; "text/template")

func main() {
	text, _ := os.ReadFile(os.Args[1])
	var values map[string]any
	json.NewDecoder(os.Stdin).Decode(&values)
	template.Must(template.New("").Parse(string(text))).Execute(os.Stdout, values)
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Ollama's template language is Go's: wants golang")
def test_ollamas_template_renders_what_the_chat_template_does(run: Path, tmp_path: Path) -> None:
    """Rendered by Go's text/template, which is Ollama's engine; Ollama itself is not installed."""
    done = export(run, "format=ollama")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (run / "export" / "ollama-q8_0" / "Modelfile").read_text()
    fields = {word: text.split(f'{word} """')[1].split('"""')[0] for word in ("TEMPLATE", "SYSTEM")}
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "FROM ./base-dpo.q8_0.gguf" in text
    (tmp_path / "main.go").write_text(GO)
    (tmp_path / "template").write_text(fields["TEMPLATE"])
    build = ["go", "build", "-o", str(tmp_path / "render"), str(tmp_path / "main.go")]
    subprocess.run(build, check=True, env=os.environ | {"GOCACHE": str(tmp_path / "go"), "GO111MODULE": "off"})
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "adapter")
    turns = [
        {"role": role, "content": f'{role} {number}: <3 & "squats"\n'}
        for number in range(2)
        for role in ("user", "assistant")
    ]
    for messages in (turns[:1], turns[:3]):
        whole = [{"role": "system", "content": fields["SYSTEM"]}, *messages]
        values = {"Messages": [{name.capitalize(): value for name, value in message.items()} for message in whole]}
        rendered = subprocess.run(
            [str(tmp_path / "render"), str(tmp_path / "template")], input=json.dumps(values), capture_output=True, text=True, check=True
        )  # fmt: skip
        assert rendered.stdout == tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)


def test_a_disk_without_room_is_seen_before_anything_is_written(run: Path, small_disk: Path) -> None:
    done = export(run, f"output={small_disk / 'model'}", "format=gguf", "quantization=q4_k_m")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "MB and its disk has 4 MB free" in done.stderr
    assert not list(small_disk.iterdir())
