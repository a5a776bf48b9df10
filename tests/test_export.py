"""Exports of a run against the adapter they were made from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fitness_dpo import runs
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.inference import ask
from fitness_dpo.merge import load_exact, merge, with_defaults
from fitness_dpo.model import Policy, load_trained, save_adapter
from fitness_dpo.template import ChatTemplate
from tests.conftest import read_json


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the trained run whose adapter changes answers plainly: two steps alone hardly move a random model."""
    copy = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    weights = copy / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 if "lora_B" in name else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights)
    return copy


def prompt_ids(folder: Path, question: str) -> torch.Tensor:
    """What any program gets that renders the folder's chat template over a lone question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 5e-2)])
def test_the_merged_model_computes_what_the_adapter_does(
    run: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    config = runs.load_config(run, TrainConfig)
    policy = load_trained(run, config.model)
    folder = merge(run, tmp_path / "merged", dtype)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = "How many squats?"
    ids = torch.tensor([ChatTemplate(policy.tokenizer).prompt_ids(ask(question, config.data.system_prompt))])
    assert torch.equal(prompt_ids(folder, question), ids), "thinking off and the run's system prompt, unasked"
    with torch.no_grad():
        tuned, merged = policy.model(ids).logits, model(ids).logits
        with policy.model.disable_adapter():
            base = policy.model(ids).logits
    assert (merged - tuned).abs().max() < tolerance < 0.1 * (base - tuned).abs().max()
    settings = read_json(folder / "generation_config.json")
    assert settings["eos_token_id"] == [policy.tokenizer.eos_token_id]
    assert not settings["do_sample"]


def test_a_merge_is_whole_or_absent_and_replaces_only_its_own_run(run: Path, tmp_path: Path) -> None:
    folder = merge(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [folder], "nothing half-written beside it"
    merge(run, folder)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    record = read_json(other / "versions.json")
    (other / "versions.json").write_text(json.dumps(record | {"wandb_id": "ffffffff"}))
    with pytest.raises(InputError, match="holds what is no export of this run"):
        merge(other, folder)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="holds what is no export of this run"):
        merge(run, tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def test_an_adapter_that_is_not_finite_is_refused(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = broken / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(InputError, match="not finite"):
        merge(broken, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings"
)  # meant
@pytest.mark.parametrize(
    "changed", ["modules_to_save=[embed_tokens]", "use_dora=true", "use_rslora=true", "init=pissa"]
)
def test_every_kind_of_adapter_merges(
    changed: str, run: Path, tiny: Callable[..., tuple[TrainConfig, Policy]], tmp_path: Path
) -> None:
    config, policy = tiny(f"lora.{changed}")
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    other = tmp_path / "run"
    shutil.copytree(run, other)
    save_adapter(policy, config.model.name, other / runs.ADAPTER)
    runs.write_start(other, config, runs.read_record(run) or {})
    adapter = load_exact(other, config.model)
    ids = torch.tensor([ChatTemplate(policy.tokenizer).prompt_ids(ask("Squat?", None))])
    with torch.no_grad():
        expected = adapter.model(ids).logits
        assert torch.allclose(policy.model(ids).logits, expected, atol=1e-4)
        folder = merge(other, tmp_path / "merged", "float32")
        merged: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)


HOSTILE = 'Say "no\\n" to {{ 7 * 7 }} {% endif %} and\n ünïcode 💪'


def test_the_built_in_habits_speak_only_where_the_conversation_does_not(run: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "adapter")
    plain = tokenizer.chat_template
    user = [{"role": "user", "content": "Hi"}]
    system = [{"role": "system", "content": HOSTILE}]

    def render(template: str, messages: list[dict[str, str]], **switches: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **switches
        )
        return text

    built_in = with_defaults(plain, HOSTILE)
    assert render(built_in, user) == render(plain, system + user)
    own = [{"role": "system", "content": "Be brief."}]
    assert render(built_in, own + user) == render(plain, own + user)
    thinking = plain + "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    assert render(with_defaults(thinking, None), user) == render(thinking, user, enable_thinking=False)
    assert render(with_defaults(thinking, None), user, enable_thinking=True).endswith("<think></think>")
    assert with_defaults(plain, None) == plain
