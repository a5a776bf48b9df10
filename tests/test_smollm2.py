"""The embedded model's folder against transformers' own reading of the same GGUF."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitness_dpo.config import TrainConfig
from fitness_dpo.data import load_preferences
from fitness_dpo.smollm2 import convert_smollm2, gguf_file


@pytest.mark.slow
def test_weights_and_tokens_are_those_that_transformers_reads(
    compose_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    file = gguf_file()
    convert_smollm2(tmp_path)
    mine = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    assert mine.dtype == torch.bfloat16
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(value.equal(theirs.state_dict()[name]) for name, value in mine.state_dict().items())
    for key in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act"):
        assert getattr(mine.config, key) == getattr(theirs.config, key)

    tokenizers = [
        AutoTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    ]
    rows = load_preferences(compose_train().data).splits["test"]
    texts = [re.sub(r"\d", "", row.chosen) for row in rows]  # transformers' reading leaves digits together
    texts += ["<|im_start|>user\n½ İstanbul 日本語 🏋🏽\x07 <file_sep> \t\t x", "  a\u0301"]
    mine_ids, their_ids = (tokenizer(texts)["input_ids"] for tokenizer in tokenizers)
    assert mine_ids == their_ids
    assert tokenizers[0].batch_decode(mine_ids) == texts
    assert tokenizers[0].tokenize("12 345") == ["1", "2", "Ġ", "3", "4", "5"], "as published"
    assert tokenizers[0].eos_token_id == mine.generation_config.eos_token_id == 2
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
