"""Steps replayed from a recording against the same steps launched one by one, on an NVIDIA GPU from Ampere on."""

from typing import Any

import peft
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fitness_dpo.graphs import Recorder
from fitness_dpo.joined import join
from fitness_dpo.packed_model import PackedForward
from fitness_dpo.packing import Packed, pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs want a GPU")
SIDES = {"prompt_ids": 12, "chosen_ids": 30, "rejected_ids": 21}
"""Tokens of the shortest pair's."""


def batch(pairs: int) -> Packed:
    examples = [
        {side: torch.randint(3, 500, (9 * pair + length,)).tolist() for side, length in SIDES.items()}
        for pair in range(pairs)
    ]
    return Packed(*(tensor.cuda() for tensor in pack(examples, 200)))


@pytest.mark.parametrize("checkpointing", ["false", "true", "unsloth"])
def test_a_replayed_step_is_the_step_launched_one_by_one(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitness_dpo.graphs.LARGEST_TOKENS", len(batch(6).ids))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    base: Any = Qwen3ForCausalLM(config).bfloat16()
    model: Any = peft.get_peft_model(base.cuda(), peft.LoraConfig(r=16, target_modules="all-linear"))
    whole = join([parameter for parameter in model.parameters() if parameter.requires_grad])
    assert whole.grad is not None
    plain = PackedForward(model, compiled=True, checkpointing="false")
    recorded = PackedForward(model, compiled=True, checkpointing=checkpointing, whole=whole)
    for pairs in (2, 5, 3, 2, 7, 5, 3, 6, 2):  # 5 and 6 are more than any before, and 7 too many to record
        packed = batch(pairs)
        whole.data.normal_(0, 0.05)
        expected, found = plain.score(packed, plain.tuned), recorded.tuned_scores(packed)
        pull = torch.randn_like(expected.logps)
        gradients = []
        for scores in (found, expected):
            whole.grad.zero_()
            scores.logps.backward(pull)
            gradients.append(whole.grad.clone())
        for mine, theirs in ((found.logps, expected.logps), gradients):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=float(theirs.detach().abs().max()) * 2**-6)
    assert isinstance(recorded.tuned_scores, Recorder)
    assert len(recorded.tuned_scores.recordings) == 2, "of the shapes since the largest came"
