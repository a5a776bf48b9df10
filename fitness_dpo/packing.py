"""Preference pairs -> one row of tokens without padding: each prompt once for its two answers, and what all prompts begin
with, such as a system prompt, once for all pairs."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PACKED = "packed"
MARGIN = 0.02
"""How many more keys or answer tokens than usual a batch may have before its shape is one of its own."""
FILLER_SEQUENCES = 8
"""Added tokens are divided among so many: attention costs the square of a sequence."""


class Packed(NamedTuple):
    """`pairs` pairs as `tokens` tokens: the prefix of all prompts; then the rest of the prompt, chosen and rejected of the
    first pair, of the second and so on."""

    ids: Tensor
    """(tokens,) token ids."""
    positions: Tensor
    """(tokens,) place in the sequence; both answers go on where the prompt ends."""
    lengths: Tensor
    """(pairs, 3) tokens of prompt, chosen and rejected."""
    keys: Tensor
    """(keys,) which token each attention key is of: the prefix; then prompt, chosen, prompt, rejected of each pair."""
    first: Tensor
    """(tokens,) where a token's key stands in `keys`."""
    second: Tensor
    """(tokens,) where a prompt token's key stands again; the length of `keys` for all other tokens."""
    repeats: Tensor
    """(2 * pairs, prefix) where else the keys of the prefix stand."""
    query_starts: Tensor
    """(2 * pairs + 2,) int32: queries come as the prefix; then the prompt's rest with chosen, then rejected, of each pair."""
    key_starts: Tensor
    """(2 * pairs + 2,) int32: keys come as the prefix; then prompt with chosen, then prompt with rejected."""
    sources: Tensor
    """(answer tokens,) the token whose hidden state predicts each answer token."""
    targets: Tensor
    """(answer tokens,) ids of the answer tokens."""
    places: Tensor
    """(answer tokens,) where their log-probabilities stand in TRL's flattened (2 * pairs, width - 1)."""


def pack(examples: list[dict[str, Any]], width: int, prefix: int = 0) -> Packed:
    """Lay out tokenized pairs (prompt_ids, chosen_ids, rejected_ids) for `width` padded columns of TRL's batch.

    All prompts begin with the same `prefix` tokens, and each goes on after them.
    """
    sides = [[np.asarray(example[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")] for example in examples]
    start, none = np.arange(prefix), np.full(prefix, -1)
    parts: dict[str, list[Any]] = {name: [] for name in Packed._fields} | {
        "ids": [sides[0][0][:prefix]], "positions": [start], "keys": [start], "first": [start], "second": [none],
        "query_starts": [prefix], "key_starts": [prefix],
    }  # fmt: skip
    token = key = prefix
    for row, (prompt, chosen, rejected) in enumerate(sides):
        p, c, r = len(prompt), len(chosen), len(rejected)
        answers, again = token + p - prefix, key + p + c
        rejections, stop, end = answers + c, answers + c + r, again + p + r
        parts["ids"] += [prompt[prefix:], chosen, rejected]
        parts["positions"] += [np.arange(prefix, p + c), np.arange(p, p + r)]
        parts["keys"] += [
            start,
            np.arange(token, rejections),
            start,
            np.arange(token, answers),
            np.arange(rejections, stop),
        ]
        parts["first"] += [np.arange(key + prefix, again), np.arange(again + p, end)]
        parts["second"] += [np.arange(again + prefix, again + p), np.full(c + r, -1)]
        parts["repeats"] += [key + start, again + start]
        parts["query_starts"] += [p - prefix + c, r]
        parts["key_starts"] += [p + c, p + r]
        for line, answer, begin in ((row, chosen, answers), (row + len(sides), rejected, rejections)):
            place = line * (width - 1) + p - 1
            parts["sources"] += [[answers - 1], np.arange(begin, begin + len(answer) - 1)]
            parts["targets"].append(answer)
            parts["places"].append(np.arange(place, place + len(answer)))
        token, key = stop, end
    starts = {
        name: torch.tensor([0, *accumulate(parts.pop(name))], dtype=torch.int32)
        for name in ("query_starts", "key_starts")
    }
    repeats = torch.from_numpy(np.stack(parts.pop("repeats")))
    arrays = {name: np.concatenate(lists) for name, lists in parts.items() if lists}
    arrays["second"] = np.where(arrays["second"] < 0, key, arrays["second"])
    tensors = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    lengths = torch.tensor([[len(part) for part in row] for row in sides])
    return Packed(**tensors, **starts, repeats=repeats, lengths=lengths)


class Usual(NamedTuple):
    """What batches have for each token, about."""

    keys: float
    answers: float


def usual(pairs: Iterable[dict[str, Any]], prefix: int) -> Usual:
    sizes = np.array([[len(pair[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")] for pair in pairs])
    prompts, answers = sizes[:, 0].sum(), sizes[:, 1:].sum()
    tokens = prompts + answers - prefix * len(sizes)
    return Usual(float((2 * prompts + answers) / tokens), float(answers / tokens))


def pad(packed: Packed, nowhere: int, per_token: Usual) -> Packed:
    """`packed` with its sizes rounded up, so that batches come in few shapes. What is added weighs nothing.

    The tokens are rounded up, and the keys and answers follow them; where a batch has more of those than usual they are
    rounded up for themselves. Added tokens form sequences of their own and are never scored; added scores go to `nowhere`.
    """
    size = bucket(len(packed.ids))
    tokens = size - len(packed.ids)
    keys = room(len(packed.keys) + tokens, size * per_token.keys) - len(packed.keys) - tokens
    answers = room(len(packed.targets), size * per_token.answers) - len(packed.targets)
    fillers = torch.arange(len(packed.ids), len(packed.ids) + tokens)
    places = torch.arange(len(packed.keys), len(packed.keys) + tokens)
    ends = (torch.arange(1, FILLER_SEQUENCES + 1) * tokens // FILLER_SEQUENCES).int()
    last = len(packed.keys) + tokens + keys
    return Packed(
        ids=F.pad(packed.ids, (0, tokens)),
        positions=F.pad(packed.positions, (0, tokens)),
        lengths=packed.lengths,
        repeats=packed.repeats,
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


def room(size: int, expected: float) -> int:
    """A little more than `expected`, in whole 64s, where `size` fits; else a bucket of its own."""
    roomy = math.ceil(expected * (1 + MARGIN) / 64) * 64
    return roomy if size <= roomy else bucket(size)


def common_start(prompts: Iterable[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with and none ends with."""
    alike = takewhile(lambda column: len({*column}) == 1, zip(*(prompt[:-1] for prompt in prompts), strict=False))
    return [column[0] for column in alike]


class HostBatch(dict[str, Any]):
    """A batch of which only what the model reads goes to the GPU: TRL's losses and metrics are some hundred operations on a few
    numbers each, which a CPU finishes sooner than a GPU starts them."""

    def to(self, device: torch.device, **_: Any) -> "HostBatch":
        """Never waits, whatever accelerate asks for: it would wait for the last step's backward pass."""
        read = {name: tensor.to(device, non_blocking=True) for name, tensor in self[PACKED].items() if name != "places"}
        return HostBatch(self | {PACKED: self[PACKED] | read})


class PackedCollator:
    """The batch of TRL's DataCollatorForPreference, from which TRL takes its masks, with the same pairs packed beside it."""

    def __init__(
        self, pad_token_id: int, prefix: Sequence[int] = (), per_token: Usual | None = None, *, on_host: bool = False
    ) -> None:
        """`prefix` is what most batches' prompts begin with. With `per_token` (see `pad`) batches come in few shapes.
        `on_host` makes HostBatches."""
        self.pad_token_id, self.prefix, self.per_token, self.on_host = pad_token_id, list(prefix), per_token, on_host

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
        length = len(self.prefix)
        alike = all(len(prompt) > length and prompt[:length] == self.prefix for prompt, _ in lines)
        packed = pack(examples, width, length if alike else 0)
        if self.per_token is not None:
            packed = pad(packed, len(lines) * (width - 1), self.per_token)
        return (HostBatch if self.on_host else dict)(batch | {PACKED: packed._asdict()})
