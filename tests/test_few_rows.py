"""The turned product is the usual one, and so is attention in groups."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fitness_dpo.few_rows import MOST_ROWS, FewRowsLinear, attend_in_groups, quicken


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (MOST_ROWS, 1), (MOST_ROWS, 2)])
def test_a_quickened_layer_answers_as_before(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 5, bias=bias))
    x = torch.randn(*shape, 8)
    with torch.no_grad():
        expected = model(x)
        quicken(model)
        found = model(x)
    assert type(model[0]) is FewRowsLinear
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)


def test_other_precisions_and_training_keep_their_products() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 5, dtype=torch.bfloat16))
    quicken(model)
    assert type(model[0]) is torch.nn.Linear
    tuned = torch.nn.Sequential(torch.nn.Linear(8, 5))
    quicken(tuned)
    tuned(torch.ones(2, 8)).sum().backward()
    assert tuned[0].weight.grad is not None


@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_share_keys_attend_as_before(masked: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(30, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    if masked:
        mask[0, :4] = 0

    def logits() -> torch.Tensor:
        with torch.no_grad():
            cache = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
            found: torch.Tensor = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
        return found

    expected = logits()
    attend_in_groups(model)
    assert model.config._attn_implementation == "grouped"
    torch.testing.assert_close(logits(), expected)
