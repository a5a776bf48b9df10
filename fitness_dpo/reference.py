"""Reference log-probabilities, computed once for a base model and a pair, and kept on disk for every later run.

A run's beta, rank, seed and learning rate do not matter to the reference, so the runs of a sweep share it. Each run adds
one file of the rows it had to compute; files are never changed, so a shared folder and runs at the same time are safe.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from fitness_dpo.runs import write_whole
from fitness_dpo.weights import cache_folder, locked


class Logps(NamedTuple):
    """Sums over the answers' tokens, in nats."""

    chosen: float
    rejected: float


INDIFFERENT = ("_name_or_path", "transformers_version", "use_cache")
Pair = dict[str, list[int]]
"""prompt_ids, chosen_ids, rejected_ids."""


def reference_logps(base: str, pairs: list[Pair], compute: Callable[[list[Pair]], Iterable[Logps]]) -> list[Logps]:
    """The reference's Logps of each pair. `compute` is called for the pairs that no earlier run left behind, if any.

    `base` names what the values depend on beside the token ids (see `fingerprint`). Processes that ask at once wait for
    the first, which computes.
    """
    folder = cache_folder() / "reference" / base
    folder.mkdir(parents=True, exist_ok=True)
    keys = [pair_key(pair) for pair in pairs]
    with locked(folder.with_suffix(".lock")):
        known = read(folder)
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        if missing:
            new = dict(zip(missing, compute(list(missing.values())), strict=True))
            rows = msgspec.msgpack.encode(new)
            write_whole(folder / f"{hashlib.sha256(rows).hexdigest()}.msgpack", rows)
            known |= new
    return [known[key] for key in keys]


def read(folder: Path) -> dict[str, Logps]:
    """Every row of every whole file. A file is named by its SHA-256: one that was cut or changed does not count."""
    known: dict[str, Logps] = {}
    for file in folder.glob("*.msgpack"):
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() == file.stem:
            known |= msgspec.msgpack.decode(content, type=dict[str, Logps])
        else:
            file.unlink(missing_ok=True)
    return known


def pair_key(pair: Pair) -> str:
    ids = [list(pair[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")]
    return hashlib.sha256(msgspec.msgpack.encode(ids)).hexdigest()


def fingerprint(model: Any, *, with_adapter: bool, settings: list[str]) -> str:
    """What the reference's values depend on: the model's shape, its weights as they lie in memory (so precision and
    quantization too), `settings`, and the adapter where it starts away from the base."""
    shape = {key: value for key, value in model.config.to_dict().items() if key not in INDIFFERENT}
    digest = hashlib.sha256(json.dumps([shape, settings], sort_keys=True, default=str).encode())
    for name, tensor in model.named_parameters():
        if ".ref." not in name and (with_adapter or ".default." not in name):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor)}".encode())
    return digest.hexdigest()


@torch.no_grad()
def checksum(tensor: Tensor) -> tuple[int, int]:
    """Sum of the tensor's 16-bit words, plain and weighted by place, on its own device."""
    words = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = words[: words.numel() // 2 * 2].view(torch.int16)
    total, weighted = 0, 0
    for number, part in enumerate(words.split(1 << 22)):
        wide = part.long()
        total += int(wide.sum())
        weighted += int((wide * torch.arange(1, len(wide) + 1, device=wide.device)).sum()) * (number + 1)
    return total, weighted
