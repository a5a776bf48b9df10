"""The embedded models: converted once, however many ask at once, and again when the cached file is damaged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitness_dpo.weights import locate

ASK = "from fitness_dpo.weights import locate; print(locate('embedded:tiny', None))"


def ask(cache: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", ASK], env={"FITNESS_DPO_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_at_once_build_one_model_and_a_damaged_one_is_built_again(tmp_path: Path) -> None:
    both = [ask(tmp_path), ask(tmp_path)]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = map(Path, folders)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["tiny"], "no half-built folder is left"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert ask(tmp_path).communicate()[0].strip() == str(folder)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_the_embedded_smollm2_is_whole_and_ends_its_turns() -> None:
    folder = locate("embedded:smollm2-135m-instruct", None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.bfloat16
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert model.generation_config.eos_token_id == 2
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    assert (backend["decoder"]["type"], backend["model"]["byte_fallback"]) == ("ByteLevel", False), "no SentencePiece"
    text = "3 sets , 1,000 m\n\té 💪🏽"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
