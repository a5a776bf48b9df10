"""Preference pairs -> one row of tokens without padding, each prompt once for its two answers."""

import math
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PACKED = "packed"
MARGIN = 0.1
"""How far a batch's share of prompt tokens may lie from the usual before its shape is one of its own."""
FILLER_SEQUENCES = 8
"""Added tokens are divided among so many: attention costs the square of a sequence."""


class Packed(NamedTuple):
    """`pairs` pairs as `tokens` tokens: prompt, chosen, rejected of the first, then of the second and so on."""

    ids: Tensor
    """(tokens,) token ids."""
    positions: Tensor
    """(tokens,) place in the sequence; both answers go on where the prompt ends."""
    lengths: Tensor
    """(pairs, 3) tokens of prompt, chosen and rejected."""
    keys: Tensor
    """(keys,) which token each attention key is of: prompt, chosen, prompt, rejected of each pair."""
    first: Tensor
    """(tokens,) where a token's key stands in `keys`."""
    second: Tensor
    """(tokens,) where a prompt token's key stands again; the length of `keys` for tokens of an answer."""
    query_starts: Tensor
    """(2 * pairs + 1,) int32: queries come as prompt with chosen, then rejected, of each pair."""
    key_starts: Tensor
    """(2 * pairs + 1,) int32: keys come as prompt with chosen, then prompt with rejected."""
    sources: Tensor
    """(answer tokens,) the token whose hidden state predicts each answer token."""
    targets: Tensor
    """(answer tokens,) ids of the answer tokens."""
    places: Tensor
    """(answer tokens,) where their log-probabilities stand in TRL's flattened (2 * pairs, width - 1)."""


def pack(examples: list[dict[str, Any]], width: int) -> Packed:
    """Lay out tokenized pairs (prompt_ids, chosen_ids, rejected_ids) for `width` padded columns of TRL's batch."""
    sides = [[np.asarray(example[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")] for example in examples]
    parts: dict[str, list[Any]] = {name: [] for name in Packed._fields}
    token = key = 0
    for row, (prompt, chosen, rejected) in enumerate(sides):
        p, c, r = len(prompt), len(chosen), len(rejected)
        places = np.arange(p + max(c, r))
        answers, rejections, stop = token + p, token + p + c, token + p + c + r
        parts["ids"] += [prompt, chosen, rejected]
        parts["positions"] += [places[: p + c], places[p : p + r]]
        parts["keys"] += [np.arange(token, rejections), np.arange(token, answers), np.arange(rejections, stop)]
        parts["first"] += [np.arange(key, key + p + c), np.arange(key + 2 * p + c, key + 2 * p + c + r)]
        parts["second"] += [np.arange(key + p + c, key + 2 * p + c), np.full(c + r, -1)]
        parts["query_starts"] += [p + c, r]
        parts["key_starts"] += [p + c, p + r]
        for line, answer, begin in ((row, chosen, answers), (row + len(sides), rejected, rejections)):
            place = line * (width - 1) + p - 1
            parts["sources"] += [[answers - 1], np.arange(begin, begin + len(answer) - 1)]
            parts["targets"].append(answer)
            parts["places"].append(np.arange(place, place + len(answer)))
        token, key = stop, key + 2 * p + c + r
    arrays = {name: np.concatenate(lists) for name, lists in parts.items() if lists and np.ndim(lists[-1])}
    arrays["second"] = np.where(arrays["second"] < 0, key, arrays["second"])
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    starts = {
        name: torch.tensor([0, *accumulate(parts[name])], dtype=torch.int32) for name in ("query_starts", "key_starts")
    }
    return Packed(**tensors, **starts, lengths=torch.tensor([[len(part) for part in row] for row in sides]))


def pad(packed: Packed, nowhere: int, prompt_share: float) -> Packed:
    """`packed` with its sizes rounded up, so that batches come in few shapes. What is added weighs nothing.

    The keys and answers follow the tokens, as in a batch with a `prompt_share` of prompt tokens; where a batch has more of
    them they are rounded up for themselves. Added tokens form sequences of their own and are never scored; added scores go to
    the place `nowhere`.
    """
    size = bucket(len(packed.ids))
    tokens = size - len(packed.ids)
    keys = room(len(packed.keys) + tokens, size * (1 + (1 + MARGIN) * prompt_share)) - len(packed.keys) - tokens
    answers = room(len(packed.targets), size * (1 - (1 - MARGIN) * prompt_share)) - len(packed.targets)
    fillers = torch.arange(len(packed.ids), len(packed.ids) + tokens)
    places = torch.arange(len(packed.keys), len(packed.keys) + tokens)
    ends = (torch.arange(1, FILLER_SEQUENCES + 1) * tokens // FILLER_SEQUENCES).int()
    last = len(packed.keys) + tokens + keys
    return Packed(
        ids=F.pad(packed.ids, (0, tokens)),
        positions=F.pad(packed.positions, (0, tokens)),
        lengths=packed.lengths,
        keys=F.pad(torch.cat([packed.keys, fillers]), (0, keys)),
        first=torch.cat([packed.first, places]),
        second=torch.cat([packed.second.where(packed.second < len(packed.keys), last), torch.full((tokens,), last)]),
        query_starts=torch.cat([packed.query_starts, packed.query_starts[-1] + ends]),
        key_starts=torch.cat([packed.key_starts, packed.key_starts[-1] + ends]),
        sources=F.pad(packed.sources, (0, answers)),
        targets=F.pad(packed.targets, (0, answers)),
        places=F.pad(packed.places, (0, answers), value=nowhere),
    )


def bucket(size: int) -> int:
    """The next multiple of 256, or of a sixteenth of the power of two below, whichever is coarser."""
    step = max(256, 1 << max(size.bit_length() - 5, 0))
    return -(-size // step) * step


def room(size: int, usual: float) -> int:
    """`usual` in whole 64s where `size` fits, else a bucket of its own."""
    roomy = math.ceil(usual / 64) * 64
    return roomy if size <= roomy else bucket(size)


class HostBatch(dict[str, Any]):
    """A batch of which only the packed pairs go to the GPU: TRL's losses and metrics are some hundred operations on a few
    numbers each, which a CPU finishes sooner than a GPU starts them."""

    def to(self, device: torch.device, **how: Any) -> "HostBatch":
        return HostBatch(self | {PACKED: {name: tensor.to(device, **how) for name, tensor in self[PACKED].items()}})


class PackedCollator:
    """The batch of TRL's DataCollatorForPreference, from which TRL takes its masks, with the same pairs packed beside it."""

    def __init__(self, pad_token_id: int, *, prompt_share: float | None = None, on_host: bool = False) -> None:
        """With a `prompt_share` (see `pad`) batches come in few shapes. `on_host` makes HostBatches."""
        self.pad_token_id, self.prompt_share, self.on_host = pad_token_id, prompt_share, on_host

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        lines = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in examples]
        width = max(len(prompt) + len(answer) for prompt, answer in lines)
        ids = np.full((len(lines), width), self.pad_token_id)
        attention, completion = np.zeros_like(ids), np.zeros_like(ids)
        for row, (prompt, answer) in enumerate(lines):
            end = len(prompt) + len(answer)
            ids[row, : len(prompt)], ids[row, len(prompt) : end] = prompt, answer
            attention[row, :end] = completion[row, len(prompt) : end] = 1
        arrays = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([pair[name] for pair in examples])
        packed = pack(examples, width)
        if self.prompt_share is not None:
            packed = pad(packed, len(lines) * (width - 1), self.prompt_share)
        return (HostBatch if self.on_host else dict)(batch | {PACKED: packed._asdict()})
