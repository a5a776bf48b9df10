"""The turned product is the usual one."""

import pytest
import torch

from fitness_dpo.few_rows import MOST_ROWS, FewRowsLinear, quicken


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
