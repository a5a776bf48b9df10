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
from fitness_dpo.config import InputError, ParityConfig, TrainConfig
from fitness_dpo.config.export import ThresholdsConfig
from fitness_dpo.folder import new_folder
from fitness_dpo.inference import ask
from fitness_dpo.merge import load_exact, merge, with_defaults
from fitness_dpo.model import Policy, load_trained, save_adapter
from fitness_dpo.ollama import turns
from fitness_dpo.parity import TorchAnswerer, answers, compare, load_merged
from fitness_dpo.template import ChatTemplate
from tests.conftest import read_json, run_verb


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


def test_a_disk_without_room_is_seen_before_anything_is_written(run: Path, small_disk: Path) -> None:
    with pytest.raises(InputError, match=r"needs 2\d MB and its disk has 4 MB free"):
        merge(run, small_disk / "models" / "new")
    assert not list(small_disk.iterdir())


def write_bytes(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(bytes(8_000_000))


def write_tensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(2_000_000)}, folder / "model.safetensors")


@pytest.mark.parametrize("write", [write_bytes, write_tensors])
def test_a_disk_that_runs_full_is_left_as_it_was(write: Callable[[Path], None], small_disk: Path) -> None:
    with (
        pytest.raises(InputError, match="its disk ran full, nothing was kept"),
        new_folder(small_disk / "new" / "model", {"run_id": "1"}) as beside,
    ):
        write(beside)
    assert not list(small_disk.iterdir())


def test_a_place_that_cannot_be_written_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output=.*/file/models/new: no folder can be made there \(Not a directory"):
        merge(run, tmp_path / "file" / "models" / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


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


PARITY = ParityConfig(
    prompts=["How many squats?", "Does it hurt?"], max_new_tokens=12, required=False,
    thresholds=ThresholdsConfig(float32=1e-3, float16=0.05, bfloat16=0.5, f16=0.1, q8_0=0.5, q4_k_m=4.0), kept=0.25,
)  # fmt: skip


def scaled(run: Path, scale: float, copy: Path) -> Path:
    """The run with its adapter's scale changed."""
    shutil.copytree(run, copy)
    settings = copy / "adapter" / "adapter_config.json"
    known = read_json(settings)
    settings.write_text(json.dumps(known | {"lora_alpha": known["lora_alpha"] * scale}))
    return copy


def test_parity_catches_an_adapter_merged_with_the_wrong_scale_or_not_at_all(run: Path, tmp_path: Path) -> None:
    config = runs.load_config(run, TrainConfig)
    faint = scaled(run, 0.01, tmp_path / "faint")  # small enough to act linearly
    right = load_exact(faint, config.model)
    reference = answers(TorchAnswerer(right, config.data.system_prompt), PARITY)
    faithful = compare("faithful", load_merged(merge(faint, tmp_path / "faithful", "float32")), reference, 1e-3, 0.25)
    assert faithful.breach() is None
    assert (faithful.same, faithful.largest < 1e-4) == (2, True)

    for name, scale in (("doubled", 2.0), ("lost", 0.0)):
        broken = scaled(faint, scale, tmp_path / name)
        found = compare(name, load_merged(merge(broken, tmp_path / f"{name}-merged", "float32")), reference, 0.5, 0.25)
        assert found.kept == pytest.approx(scale, abs=0.3), "far below the threshold of the largest difference"
        assert "its adapter was lost or scaled" in str(found.breach())
    with pytest.raises(InputError, match="in other tokens than training did"):
        compare("asked otherwise", TorchAnswerer(right, "Be brief."), reference, 0.5, 0.25)


def test_an_answer_may_part_at_a_tie_only(run: Path) -> None:
    config = runs.load_config(run, TrainConfig)
    answerer = TorchAnswerer(load_exact(run, config.model), config.data.system_prompt)
    (first, _) = answers(answerer, PARITY)
    second_choice = int(first.logps[3].argsort()[-2])
    gap = float(first.logps[3].max() - first.logps[3, second_choice])

    class Parting(TorchAnswerer):
        def answer_ids(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
            return [*first.answer_ids[:3], second_choice, *first.answer_ids[4:]]

    parting = Parting(answerer.policy, config.data.system_prompt)
    assert compare("near", parting, [first], gap, 0.25).breach() is None
    assert first.question in str(compare("far", parting, [first], gap / 2.1, 0.25).breach())


def export(*arguments: str, cwd: Path) -> str:
    """The one line of an export that is refused, and leaves nothing."""
    done = run_verb("export", *arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_the_verb_writes_a_model_that_answers_as_the_terminal_does(run: Path, tmp_path: Path) -> None:
    done = run_verb("export", f"run={run}", "dtype=float32", "parity.max_new_tokens=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "merged, float32" in done.stdout
    assert "5 of 5" in done.stdout
    folder = run / "export" / "merged"
    card = (folder / "README.md").read_text()
    for fact in (
        "pairs.json",
        "beta 0.1",
        "rank 16",
        "5 of 5 greedy answers the same",
        "no medical advice",
        "apache-2.0",
    ):
        assert fact in card
    arguments = ["prompt=How many squats?", "model.dtype=float32", "sampling.max_new_tokens=8"]
    terminal = run_verb("infer", f"run={run}", *arguments, cwd=tmp_path)
    merged = run_verb("infer", f"model.name={folder}", *arguments, cwd=tmp_path)
    assert terminal.returncode == merged.returncode == 0, terminal.stderr + merged.stderr
    assert terminal.stdout == merged.stdout != ""
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_leaves_nothing(run: Path, tmp_path: Path) -> None:
    line = export(f"run={run}", f"output={tmp_path / 'new' / 'far'}", "parity.thresholds.bfloat16=1e-7", cwd=tmp_path)
    assert "differs from the adapter by up to" in line
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("metrics.json", "export"))
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("export"))
    settings = moved / "config.yaml"
    settings.write_text(settings.read_text().replace("embedded:tiny", "./gone"))
    before = sorted(tmp_path.rglob("*"))
    for arguments, expected in (
        ([f"run={run}", "format=onnx"], "format=onnx: choose one of merged, gguf, ollama, hub"),
        ([f"run={unfinished}"], "not finished"),
        ([f"run={moved}"], "model.name=./gone: no such folder; check the path"),
        ([f"run={moved}", "base=./nowhere"], "model.name=./nowhere: no such folder"),
        (
            [f"run={run}", "format=gguf", "llama_cpp=nowhere"],
            "no convert_hf_to_gguf.py there; install it with make llama",
        ),
        ([f"run={run}", "format=hub"], "name the repository to upload to"),
        ([f"run={run}", "format=hub", "hub.repo=me/bot"], "hub.repo=me/bot: "),
        ([f"run={run}", f"output={moved}"], "holds what is no export of this run"),
    ):
        assert expected in export(*arguments, cwd=tmp_path)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_templates_turns_give_back_the_conversation(run: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "adapter")
    thinking = (  # as Qwen3's: the last answer begins with an empty thought, earlier ones do not
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    conversation = [
        {"role": role, "content": f"{role} {number}"} for number in range(3) for role in ("user", "assistant")
    ][:-1]
    own = [{"role": "system", "content": "Be brief."}]
    for template, system in ((tokenizer.chat_template, None), (tokenizer.chat_template, HOSTILE), (thinking, "Coach.")):
        tokenizer.chat_template = with_defaults(template, system)
        made = turns(tokenizer)
        assert made.unasked == system
        for messages in (conversation[:1], conversation, own + conversation):
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert made.write(messages) == rendered
    tokenizer.chat_template = (  # as Gemma's: the system message is part of the first question
        "{% for m in messages %}{% if m.role != 'system' %}<u>{% if loop.index == 2 and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n{% endif %}{{ m.content }}</u>{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="has no Ollama form"):
        turns(tokenizer)
