"""The memory a step is said to take against what steps on an H100 took."""

import random

import pytest

from fitness_dpo.memory import Decoder, activation_bytes, most_tokens, trained_bytes
from scripts.benchmark import synthetic_rows

QWEN3 = Decoder(layers=28, hidden=1024, intermediate=3072, queries=2048, keys=1024, vocabulary=151_936)
WEIGHTS, ADAPTER = 596_049_920, 10_092_544  # of Qwen3-0.6B, and of r=16 on all seven projections


def peak_gib(pairs: int, *, packed: bool) -> float:
    rows = synthetic_rows(2000, 1000, 1.0)
    draw = random.Random(0)  # noqa: S311
    tokens = [most_tokens(draw.sample(rows, pairs), pairs, None, packed=packed) for _ in range(20)]
    held = 2 * WEIGHTS + 4 * ADAPTER + trained_bytes(ADAPTER)
    return (held + activation_bytes(QWEN3, max(tokens), 2, packed=packed, checkpointing="false")) / 2**30


@pytest.mark.parametrize(
    ("packed", "pairs", "measured_gib"),
    [(True, 8, 7.8), (True, 32, 18.7), (True, 96, 49.1), (False, 8, 9.3), (False, 32, 42.7)],
)
def test_the_estimate_is_within_a_fifth_of_what_20_steps_took(packed: bool, pairs: int, measured_gib: float) -> None:
    assert peak_gib(pairs, packed=packed) == pytest.approx(measured_gib, rel=0.2)
