"""The cache that answers grow in holds what transformers' own does."""

import torch
from transformers.cache_utils import DynamicLayer

from fitness_dpo.decoding import ROOM, RoomyLayer


def test_a_cache_with_room_holds_what_one_without_it_does() -> None:
    torch.manual_seed(0)
    roomy, plain = RoomyLayer(), DynamicLayer()  # type: ignore[no-untyped-call]
    for step in range(2 * ROOM):
        if step == 3:
            for layer in (roomy, plain):
                layer.batch_repeat_interleave(4)
        if step == ROOM // 2:
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor([0, 2, 3]))
        rows = 1 if step < 3 else 4 if step < ROOM // 2 else 3
        new = torch.randn(2, rows, 1 if step else 5, 2, 8).transpose(2, 3)  # as attention layers hand them over
        for found, expected in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
    long = torch.randn(2, 3, 2, 3 * ROOM, 8)
    assert torch.equal(roomy.update(*long)[0], plain.update(*long)[0])
    assert roomy.get_seq_length() == plain.get_seq_length() == 5 * ROOM + 4
