"""Texts that say nearly the same: MinHash proposes the candidates, a comparison of the words decides. Imports no torch."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import rensa

IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # written without spaces: each counts as a word
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\W_{IDEOGRAPHS}]+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
HASHES = 64
BAND = 4
"""Hashes that must agree for two texts to be compared: one of 16 bands does so for 99.9% of texts at a similarity of 0.8."""
ESTIMATE_ERROR = 0.2
"""More than three standard deviations of the similarity that 64 hashes estimate."""
CHUNK = 8192


def words(text: str) -> list[str]:
    """The words of a text, whatever its case and punctuation."""
    return WORD.findall(text.casefold())


def shingles(text: str) -> set[str]:
    """Words and neighbouring words."""
    found = words(text) or [text]
    return {*found, *map(" ".join, itertools.pairwise(found))}


def similarity(one: str, other: str) -> float:
    """Jaccard index of the shingles, 0 to 1; texts with other numbers in them are not alike at all."""
    if NUMBER.findall(one) != NUMBER.findall(other):
        return 0.0
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def near_groups(texts: Sequence[str], threshold: float) -> list[int]:
    """For each text the position of the first one in its group: texts whose similarity is `threshold` or more.

    Groups are closed: if a is like b and b like c, all three are one. Each candidate is compared with the first text of
    its bucket only, so the work grows with the number of texts and not with its square.
    """
    positions: dict[str, int] = {}
    for text in texts:
        positions.setdefault(text, len(positions))
    unique = list(positions)
    hashes = minhash(unique)
    numbers = np.array([hash(tuple(NUMBER.findall(text))) for text in unique], dtype=np.int64).view(np.uint64)
    parent = list(range(len(unique)))
    for start in range(0, HASHES, BAND):
        bucket = numbers.copy()
        for column in range(start, start + BAND):
            bucket = bucket * np.uint64(0x9E3779B97F4A7C15) + hashes[:, column]
        _, first, which = np.unique(bucket, return_index=True, return_inverse=True)
        later = np.flatnonzero(first[which] != np.arange(len(unique)))
        earlier = first[which][later]
        likely = (hashes[later] == hashes[earlier]).mean(axis=1) >= threshold - ESTIMATE_ERROR
        for one, other in zip(earlier[likely].tolist(), later[likely].tolist(), strict=True):
            roots = root(parent, one), root(parent, other)
            if roots[0] != roots[1] and similarity(unique[one], unique[other]) >= threshold:
                parent[max(roots)] = min(roots)
    first_text = [root(parent, positions[text]) for text in texts]
    first_seen: dict[int, int] = {}
    return [first_seen.setdefault(group, position) for position, group in enumerate(first_text)]


def root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = node = parent[parent[node]]
    return node


def minhash(texts: list[str]) -> "np.ndarray[Any, np.dtype[np.uint32]]":
    """(texts, HASHES) MinHash signatures."""
    signatures = np.empty((len(texts), HASHES), dtype=np.uint32)
    for start in range(0, len(texts), CHUNK):
        sets = [list(shingles(text)) for text in texts[start : start + CHUNK]]
        matrix = rensa.RMinHash.digest_matrix_from_token_sets(sets, HASHES, 0)
        signatures[start : start + len(sets)] = matrix.to_rows()
    return signatures
