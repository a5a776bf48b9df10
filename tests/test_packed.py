"""The packed forward against TRL's own loss code on padded rows with plain logits and log_softmax, in 32 bits on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.config.dpo import LOSS_TYPES
from fitness_dpo.data import load_preferences
from fitness_dpo.decoder import LoraProduct, WideLoraProduct
from fitness_dpo.model import Policy
from fitness_dpo.packed_model import PackedForward
from fitness_dpo.packing import PackedCollator, Usual, bucket, common_start, pack, pad
from fitness_dpo.preference_trainer import PreferenceTrainer, divide, pair_tokens
from fitness_dpo.trainer import build_trainer

Tiny = Callable[..., tuple[TrainConfig, Policy]]
BOTH = ["packed", "padded"]


def trainer_of(tiny: Tiny, pairs_file: Path, run: Path, *overrides: str) -> PreferenceTrainer:
    config, policy = tiny(f"data.path={pairs_file}", "data.max_rows=6", *overrides)
    trainer = build_trainer(config, policy, load_preferences(config.data).splits, run, [])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if ".lora_B.default" in name:  # away from the reference, where every loss has another value
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    assert isinstance(trainer, PreferenceTrainer)
    return trainer


@contextmanager
def plain_logits(trainer: PreferenceTrainer) -> Iterator[None]:
    """Answer TRL's call from padded rows by the model's own forward and log_softmax over all logits."""
    model = trainer.model.get_base_model()
    served = model.forward

    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, packed: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return served.otherwise(*args, **kwargs)
        logits = served.otherwise(*args, **kwargs).logits[:, :-1]
        every = logits.log_softmax(-1)
        wanted = labels[:, 1:]
        mask = wanted != -100
        logps = every.gather(-1, wanted.clamp(min=0)[..., None]).squeeze(-1) * mask
        return FusedCausalLMOutput(
            loss=-logps.sum(), log_probs=logps, entropy=-(every.exp() * every).sum(-1) * mask,
            mean_logits=logits.mean(-1) * mask, is_top1=(logits.argmax(-1) == wanted) & mask,
        )  # fmt: skip

    assert isinstance(served, PackedForward)
    model.forward = forward
    try:
        yield
    finally:
        model.forward = served


def loss_gradients_and_metrics(
    trainer: PreferenceTrainer,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}  # a sum
    return loss.detach(), gradients, metrics


@pytest.fixture(scope="module")
def trainer(tiny: Tiny, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    return trainer_of(tiny, pairs_file, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_and_its_gradients_are_those_of_padded_rows(trainer: PreferenceTrainer, loss_type: str) -> None:
    trainer.loss_types, trainer.label_smoothing = [loss_type], 0.1
    loss, gradients, metrics = loss_gradients_and_metrics(trainer)
    with plain_logits(trainer):
        expected, expected_gradients, expected_metrics = loss_gradients_and_metrics(trainer)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert set(gradients) == set(expected_gradients)
    assert len(gradients) == 28, "A and B of seven projections in two layers"
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-5 * scale, msg=name)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-4)


def families() -> dict[str, Callable[[], Any]]:
    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
    }  # fmt: skip
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=scaled)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True)),
    }


@pytest.mark.parametrize("prefix", [[], [7, 8, 9]], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_log_probabilities_of_every_family_are_the_models_own(family: str, prefix: list[int]) -> None:
    import peft

    torch.manual_seed(0)
    base = families()[family]()
    for name, parameter in base.named_parameters():
        if name.endswith("bias") or "norm" in name:  # their initial zeros and ones would hide a mistake
            parameter.data.normal_(1.0, 0.2)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    pairs = [
        {side: torch.randint(3, 300, (length,)).tolist() for side, length in zip(SIDES, lengths, strict=True)}
        for lengths in ((5, 3, 9), (4, 1, 1), (11, 20, 2))
    ]
    for pair in pairs:
        pair["prompt_ids"][: len(prefix)] = prefix
    batch = PackedCollator(0, prefix)(pairs)
    assert batch["packed"]["repeats"].shape == (6, len(prefix))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        every = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        expected = every[:, :-1].gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        PackedForward(model, compiled=False, checkpointing="false")
        found = model(input_ids=batch["input_ids"], labels=labels, fused_lm_head=True, packed=batch["packed"]).log_probs
    mask = batch["completion_mask"][:, 1:].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    assert not found[~mask].any()


SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")
PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]},
    {"prompt_ids": [11], "chosen_ids": [12], "rejected_ids": [13, 14, 15]},
]


def test_what_all_prompts_begin_with_is_laid_out_once() -> None:
    pairs = [pair | {"prompt_ids": [1, 2, *pair["prompt_ids"]]} for pair in PAIRS]
    prefix = common_start(pair["prompt_ids"] for pair in pairs)
    assert prefix == [1, 2]
    packed = pack(pairs, 7, len(prefix))
    assert packed.ids.tolist() == [1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 2, 3, 3, 4, 5]
    assert packed.keys.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 7, 0, 1, 8, 9, 0, 1, 8, 10, 11, 12]
    assert packed.first.tolist() == [0, 1, 4, 5, 6, 7, 8, 14, 17, 18, 22, 23, 24]
    assert packed.second.tolist() == [25, 25, 11, 12, 13, 25, 25, 25, 21, 25, 25, 25, 25]
    assert packed.repeats.tolist() == [[2, 3], [9, 10], [15, 16], [19, 20]]
    assert packed.query_starts.tolist() == [0, 2, 7, 8, 10, 13]
    assert packed.key_starts.tolist() == [0, 2, 9, 15, 19, 25]
    assert packed.sources.tolist() == [4, 5, 4, 8, 8, 10, 11]
    assert packed.places.tolist() == [4, 5, 16, 8, 20, 21, 22]
    assert packed.ids[packed.keys[packed.first]].tolist() == packed.ids.tolist()


def test_a_prompt_never_lies_in_the_prefix_whole() -> None:
    """Its last token predicts the answers' first, one of each pair."""
    assert common_start([[1, 2], [1, 2, 3]]) == [1]
    assert PackedCollator(0, [5, 6, 7])(PAIRS)["packed"]["repeats"].shape == (4, 0), "they do not begin so"


def test_the_layout_of_two_pairs() -> None:
    packed = pack(PAIRS, 5)
    assert packed.ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]
    assert packed.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 8, 9, 10]
    assert packed.first.tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 12, 13, 14]
    assert packed.second.tolist() == [5, 6, 7, 15, 15, 15, 11, 15, 15, 15, 15]
    assert packed.query_starts.tolist() == [0, 0, 5, 6, 8, 11]
    assert packed.key_starts.tolist() == [0, 0, 5, 9, 11, 15]
    assert packed.sources.tolist() == [2, 3, 2, 6, 6, 8, 9]
    assert packed.targets.tolist() == [8, 9, 10, 12, 13, 14, 15]
    assert packed.places.tolist() == [2, 3, 10, 4, 12, 13, 14]


def test_added_tokens_are_sequences_of_their_own_and_never_scored() -> None:
    packed = pack(PAIRS, 5)
    padded = pad(packed, 16, Usual(keys=1.4, answers=0.6))
    assert len(padded.ids) == bucket(11) == 256
    assert len(padded.targets) == 192, "1.02 x 0.6 x 256, in whole 64s"
    assert len(padded.keys) == 384, "1.02 x 1.4 x 256"
    for kept, name in (
        (11, "ids"),
        (11, "positions"),
        (11, "first"),
        (15, "keys"),
        (7, "sources"),
        (7, "targets"),
        (7, "places"),
    ):
        assert torch.equal(getattr(padded, name)[:kept], getattr(packed, name))
    assert padded.places[7:].unique().tolist() == [16]
    assert padded.query_starts[:6].tolist() == packed.query_starts.tolist()
    assert padded.query_starts[-1] == 256
    assert padded.key_starts[-1] == 15 + 245
    assert padded.keys[15:260].tolist() == padded.first[11:].new_tensor(range(11, 256)).tolist()
    assert (padded.second == len(padded.keys)).sum() == 256 - 4, "only the four tokens of the prompts have a second key"
    assert len(pad(packed, 16, Usual(keys=1.4, answers=0.1)).targets) == 64, "7 fit"
    assert len(pad(pack(PAIRS * 20, 5), 200, Usual(keys=1.4, answers=0.1)).targets) == 256, "140 do not"


def test_the_padded_half_of_a_batch_is_trls() -> None:
    rows = [pair | {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0} for pair in PAIRS]
    expected, found = DataCollatorForPreference(0)(rows), PackedCollator(0)(rows)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_4bit_weights_are_unpacked_to_the_dtype_of_the_arithmetic(
    tiny: Tiny, pairs_file: Path, tmp_path: Path, checkpointing: str
) -> None:
    quantized = ["model.load_in_4bit=true", "model.dtype=bfloat16", f"model.gradient_checkpointing='{checkpointing}'"]
    figures = [
        trainer_of(tiny, pairs_file, tmp_path / forward, f"dpo.forward={forward}", *quantized).evaluate()
        for forward in ("packed", "padded")
    ]
    for name in ("eval_logps/chosen", "eval_logps/rejected"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=2**-8), name


def test_checkpointing_gives_the_same_gradients(
    tiny: Tiny, pairs_file: Path, tmp_path: Path, trainer: PreferenceTrainer
) -> None:
    trainer.loss_types, trainer.label_smoothing = ["sigmoid"], 0.0
    expected = loss_gradients_and_metrics(trainer)
    found = loss_gradients_and_metrics(trainer_of(tiny, pairs_file, tmp_path, "model.gradient_checkpointing=true"))
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("forward", BOTH)
def test_micro_batches_add_up_to_the_whole_batch(tiny: Tiny, pairs_file: Path, tmp_path: Path, forward: str) -> None:
    overrides = [f"dpo.forward={forward}", "dpo.batch_size=6", "dpo.gradient_accumulation_steps=1", "dpo.max_steps=1"]
    histories = []
    for number, budget in enumerate(("null", "700")):
        trainer = trainer_of(tiny, pairs_file, tmp_path / str(number), *overrides, f"dpo.micro_batch_tokens={budget}")
        trainer.train()
        histories.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    assert 1 < len(divide(list(trainer.train_dataset), 700)) < 6
    for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert histories[1][name] == pytest.approx(histories[0][name], rel=1e-5), name


def test_micro_batches_keep_to_their_budget_and_lose_no_pair() -> None:
    pairs = [{"prompt_ids": [1] * n, "chosen_ids": [1], "rejected_ids": [1]} for n in (9, 1, 5, 30, 2)]
    parts = divide(pairs, 14)
    assert [[pair_tokens(pair) for pair in part] for part in parts] == [[3, 4, 7], [11], [32]]


def test_what_the_packed_forward_lacks_is_named(tiny: Tiny, pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dpo.forward=packed: it has no lora.dropout; set dpo.forward=auto"):
        trainer_of(tiny, pairs_file, tmp_path, "dpo.forward=packed", "lora.dropout=0.1")
    with pytest.raises(InputError, match=r"dpo.forward=packed: lora.init=pissa starts away from the base"):
        trainer_of(
            tiny, pairs_file, tmp_path, "dpo.forward=packed", "lora.init=pissa", "dpo.precompute_reference=false"
        )
    config, policy = tiny(f"data.path={pairs_file}", "lora.dropout=0.1")
    assert not build_trainer(config, policy, load_preferences(config.data).splits, tmp_path, []).packed


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (40, 24)])
def test_a_product_and_its_gradients_are_the_same_the_way_gpus_compute_it(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    sizes = ((7, inputs), (outputs, inputs), (4, inputs), (outputs, 4))
    x, w, a, b = (torch.randn(size, requires_grad=size != (outputs, inputs)) for size in sizes)
    pull = torch.randn(7, outputs)
    for function in (LoraProduct, WideLoraProduct):
        result: Any = function.apply(x, w, a, b)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(result, x @ w.T + x @ a.T @ b.T)
        plain = torch.autograd.grad(x @ w.T + x @ a.T @ b.T, (x, a, b), pull)
        torch.testing.assert_close(torch.autograd.grad(result, (x, a, b), pull), plain)
