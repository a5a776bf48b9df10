"""The Triton kernels against torch's own operations: compiled where there is a GPU, else interpreted. A CPU build of torch brings
no Triton."""

import random

import pytest
import torch

from fitness_dpo.decoder import Adapted, Layer, Shape, attend_rows, row_layout, split_heads
from fitness_dpo.logprobs import score_chunk
from fitness_dpo.packing import Packed, pack, pad, usual

pytest.importorskip("triton", reason="comes with a CUDA build of torch, or pip install triton (1 GB unpacked)")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def there(packed: Packed) -> Packed:
    return Packed(*(tensor.to(DEVICE) for tensor in packed))


@pytest.mark.parametrize(
    ("prefix", "heads", "key_heads", "filled", "normed"),
    [(0, 4, 2, True, True), (5, 6, 2, True, False), (7, 3, 1, False, True), (0, 2, 2, True, False)],
)
def test_attention_and_its_gradients_are_those_of_plain_products(
    prefix: int, heads: int, key_heads: int, filled: bool, normed: bool
) -> None:
    from fitness_dpo.attention_kernels import attend_kernel, kernel_layout

    draw = random.Random(prefix)  # noqa: S311

    def ids(most: int) -> list[int]:
        return [draw.randrange(50) for _ in range(draw.randint(1, most))]

    start = [draw.randrange(50) for _ in range(prefix)]
    pairs = [{"prompt_ids": start + ids(40), "chosen_ids": ids(150), "rejected_ids": ids(100)} for _ in range(3)]
    packed = there(pack(pairs, 400, prefix))
    tokens, width = len(packed.ids), 32
    given = there(pad(pack(pairs, 400, prefix), 6 * 399, usual(pairs, prefix))) if filled else packed
    torch.manual_seed(0)
    shape = Shape(heads, key_heads, width, 1e-6)
    query_norm, key_norm = (torch.rand(width, device=DEVICE) + 0.5 if normed else None for _ in range(2))
    unused, nothing = Adapted([], None, [], [], [], []), torch.empty(0)
    layer = Layer(nothing, unused, query_norm, key_norm, unused, nothing, unused, unused)
    qkv = torch.randn(len(given.ids), (heads + 2 * key_heads) * width, device=DEVICE, requires_grad=True)
    angles = (given.positions[:, None] * torch.rand(width // 2, device=DEVICE)).repeat(1, 2)[:, None]
    cos, sin = angles.cos(), angles.sin()
    parts = split_heads(qkv[:tokens], cos[:tokens], sin[:tokens], layer, shape)
    expected = attend_rows(*parts, row_layout(packed), shape)
    found = attend_kernel(qkv, cos, sin, layer, kernel_layout(given, heads // key_heads), shape)[:tokens]
    assert found.allclose(expected, atol=1e-5)
    pull = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(each, qkv, pull)[0] for each in (found, expected))
    assert mine.allclose(theirs, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [9000, 16384])
def test_scores_over_a_vocabulary_are_those_of_log_softmax(vocabulary: int) -> None:
    from fitness_dpo.vocabulary_kernel import score_chunk_kernel

    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 16, device=DEVICE), torch.randn(vocabulary, 16, device=DEVICE)
    targets = torch.randint(vocabulary, (5,), device=DEVICE)
    targets[:2] = (hidden @ weight.T).argmax(-1)[:2]
    weight[targets[1] + 1] = weight[targets[1]]  # a tie: the first of the likeliest counts
    targets[2] = targets[1] + 1
    hidden[2] = hidden[1]
    found, expected = (score(hidden, weight, targets, True) for score in (score_chunk_kernel, score_chunk))
    assert found[3].tolist() == expected[3].tolist() == [True, True, False, False, False]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.float().allclose(theirs.float(), rtol=1e-5, atol=1e-5)
