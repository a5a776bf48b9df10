"""Training against hand calculation: where it starts, what it optimizes, and that two steps move the pairs they saw."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.data import load_preferences
from fitness_dpo.model import Policy, load_base, load_trained, save_adapter
from fitness_dpo.template import ChatTemplate
from fitness_dpo.trainer import build_trainer

Tiny = Callable[..., tuple[TrainConfig, Policy]]


def logps(policy: Policy, row: dict[str, list[int]], side: str) -> float:
    """Sum of the answer's log-probabilities, by the plain forward pass and log_softmax."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    start = len(row["prompt_ids"]) - 1
    return float(logits.gather(-1, ids[0, 1:, None])[start:].sum())


@pytest.mark.parametrize("precompute", ["true", "false"])
def test_training_starts_at_the_reference(tiny: Tiny, pairs_file: Path, tmp_path: Path, precompute: str) -> None:
    config, policy = tiny(f"data.path={pairs_file}", f"dpo.precompute_reference={precompute}")
    trainer = build_trainer(config, policy, load_preferences(config.data).splits, tmp_path, [])
    start = trainer.evaluate()
    trainer.train()
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    first_step = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first_step["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_rewards_are_beta_times_the_change_in_log_probability(tiny: Tiny, pairs_file: Path, tmp_path: Path) -> None:
    recipe = ["dpo.beta=0.3", "dpo.learning_rate=0.05", "dpo.warmup_ratio=0", "dpo.eval_batch_size=3"]
    config, policy = tiny(f"data.path={pairs_file}", *recipe)
    trainer = build_trainer(config, policy, load_preferences(config.data).splits, tmp_path, [])
    rows = list(trainer.eval_dataset or [])
    policy.model.eval()
    before = [[logps(policy, row, side) for side in ("chosen", "rejected")] for row in rows]
    trainer.train()
    policy.model.eval()
    after = [[logps(policy, row, side) for side in ("chosen", "rejected")] for row in rows]
    rewards = 0.3 * (torch.tensor(after) - torch.tensor(before))
    margins = rewards[:, 0] - rewards[:, 1]
    measured = trainer.evaluate()
    assert margins.abs().mean() > 0.01, "the policy must have moved for this to say anything"
    assert len(margins) % 3, "the last batch is smaller"
    assert measured["eval_rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-3)
    assert measured["eval_rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    assert measured["eval_loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        "lora.init=default", "lora.init=gaussian", "lora.init=pissa", "lora.init=olora", "lora.init=orthogonal",
        "lora.use_dora=true", "lora.use_rslora=true", "lora.bias=all", "lora.modules_to_save=[norm]",
    ],
)  # fmt: skip
def test_a_saved_adapter_gives_back_the_trained_model(tiny: Tiny, pairs_file: Path, tmp_path: Path, kind: str) -> None:
    config, policy = tiny(f"data.path={pairs_file}", kind, "lora.r=4", "dpo.learning_rate=0.01", "dpo.warmup_ratio=0")
    trainer = build_trainer(config, policy, load_preferences(config.data).splits, tmp_path, [])
    trainer.train()
    policy.model.eval()
    (row, *_) = list(trainer.eval_dataset or [])
    trained = logps(policy, row, "chosen")
    save_adapter(policy, config.model.name, tmp_path / "adapter")
    again = load_trained(tmp_path, config.model)
    assert logps(again, row, "chosen") == pytest.approx(trained, abs=1e-3)
    assert abs(trained - logps(load_base(config.model), row, "chosen")) > 0.01


def test_rows_past_the_limit_are_left_out_and_counted(tiny: Tiny, pairs_file: Path, tmp_path: Path) -> None:
    config, policy = tiny(f"data.path={pairs_file}")
    splits, template = load_preferences(config.data).splits, ChatTemplate(policy.tokenizer)
    lengths = sorted(template.pair_ids(row.prompt, row.chosen, row.rejected).length for row in splits["train"])
    config, policy = tiny(f"data.path={pairs_file}", f"model.max_length_tokens={lengths[3]}")
    trainer = build_trainer(config, policy, splits, tmp_path, [])
    assert trainer.too_long["train"] == sum(length > lengths[3] for length in lengths) > 0
    config, policy = tiny(f"data.path={pairs_file}", "model.max_length_tokens=16")
    with pytest.raises(
        InputError, match=r"model.max_length_tokens=16: every one of 10 training rows is longer; raise it"
    ):
        build_trainer(config, policy, load_preferences(config.data).splits, tmp_path, [])


def test_a_target_module_the_model_lacks_is_named(tiny: Tiny) -> None:
    with pytest.raises(
        InputError, match=r"lora.target_modules=\['c_attn'\]: .*name layers of this model, or all-linear"
    ):
        tiny("lora.target_modules=[c_attn]")


def test_a_checkpoint_with_another_optimizers_state_is_refused(tiny: Tiny, pairs_file: Path, tmp_path: Path) -> None:
    config, policy = tiny(f"data.path={pairs_file}")
    trainer = build_trainer(config, policy, load_preferences(config.data).splits, tmp_path, [])
    trainer.create_optimizer_and_scheduler(2)
    each = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    torch.save(torch.optim.AdamW(each).state_dict(), tmp_path / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    with pytest.raises(InputError, match=f"resume: {tmp_path} has the state of another optimizer"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))
