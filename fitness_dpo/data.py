"""Any preference file -> clean pairs, split by question. Imports no torch."""

import hashlib
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import msgspec

from fitness_dpo.cleaning import standardise
from fitness_dpo.config import ColumnsConfig, DataConfig, InputError
from fitness_dpo.duplicates import near_groups
from fitness_dpo.examples import SPLITS, Example, Message, known_row, pair_up, to_example, to_examples
from fitness_dpo.files import data_files, read_rows
from fitness_dpo.formats import has_one_answer, plain_key
from fitness_dpo.pairs import RowError
from fitness_dpo.runs import write_whole
from fitness_dpo.weights import cache_folder

__all__ = ["Example", "Message", "Preferences", "load_preferences", "read_rows", "standardise", "to_example"]


class Preferences(NamedTuple):
    splits: dict[str, list[Example]]
    """train, validation and test, disjoint by question."""
    read: int
    dropped_rows: dict[str, list[str]]
    """By reason, where the rows stand that were left out."""
    formats: dict[str, dict[str, int]]
    """By file, how many rows of which format it holds."""

    @property
    def dropped(self) -> Counter[str]:
        """Rows left out, by reason."""
        return Counter({reason: len(places) for reason, places in self.dropped_rows.items()})

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each split's prompts and answers."""
        return {
            name: hashlib.sha256(msgspec.json.encode([row[1:4] for row in rows])).hexdigest()
            for name, rows in self.splits.items()
        }


def load_preferences(config: DataConfig) -> Preferences:
    """Read, clean, deduplicate and split the rows of `config.path`. Raises InputError naming the file and the mend.

    What was loaded from files is kept under the cache folder, so that the same files and settings load at once.
    """
    key = cache_key(config)
    if key is None:
        return prepare(config)
    file = cache_folder() / "data" / f"{key}.msgpack"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, msgspec.msgpack.encode(prepare(config)))
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Preferences)
    except msgspec.DecodeError as error:
        raise InputError(f"{file}: the cached rows are damaged ({error}); delete this file") from error


def cache_key(config: DataConfig) -> str | None:
    """A hash of the settings, the files' contents and the loader's own code; None where a hub dataset is read."""
    digest = hashlib.sha256(msgspec.json.encode(config, order="deterministic"))
    for module in ("cleaning", "data", "duplicates", "examples", "files", "formats", "pairs", "transcripts"):
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    for path in config.weights:
        files = data_files(path)
        if files is None:
            return None
        for name, file in files:
            digest.update(name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def prepare(config: DataConfig) -> Preferences:
    """load_preferences without the cache."""
    dropped: defaultdict[str, list[str]] = defaultdict(list)
    examples, read, formats = read_examples(config, dropped)
    examples, groups = deduplicate(examples, config, dropped)
    if not examples:
        counts = ", ".join(f"{len(places)} {reason}" for reason, places in dropped.items())
        raise InputError(f"data.path={config.path}: no usable row of {read}: {counts}; mend them (docs/formats.md)")
    splits = split_by_question(examples, groups, config)
    draw = random.Random(config.seed)  # noqa: S311
    splits["train"] = weigh(splits["train"], config.weights, draw)
    if not splits["train"]:
        raise InputError(
            f"data.path={config.path}: no row is left to train on of {len(examples)}; lower data.test_size or "
            "data.validation_size, or raise the weights"
        )
    for name, limit in (("train", config.max_rows), ("validation", config.max_validation_rows)):
        if limit is not None and limit < len(splits[name]):
            splits[name] = draw.sample(splits[name], limit)
    return Preferences(splits, read, dict(dropped), formats)


def read_examples(
    config: DataConfig, dropped: defaultdict[str, list[str]]
) -> tuple[list[Example], int, dict[str, dict[str, int]]]:
    """Every usable pair of every path, the number of rows read, and the formats by file. Raises InputError for a file
    that holds no row of a known format."""
    examples: list[Example] = []
    formats: dict[str, Counter[str]] = {}
    unknown: dict[str, set[str]] = {}
    read = 0
    for source in config.weights:
        for place, row in read_rows(source):
            read += 1
            tally = formats.setdefault(place.file, Counter())
            try:
                entry, row = known_row(row, config.columns)
                tally[entry.name] += 1
                examples += to_examples(str(place), entry, row, config, source)
            except RowError as reason:
                dropped[str(reason)].append(str(place))
                if not tally:
                    unknown.setdefault(place.file, set()).update(row if isinstance(row, dict) else ())
    for file, tally in formats.items():
        if not tally:
            raise InputError(refusal(file, unknown[file], config.columns))
    return pair_up(examples, dropped), read, {file: dict(tally) for file, tally in formats.items()}


def refusal(file: str, columns: set[str], named: ColumnsConfig) -> str:
    found = f"(columns found: {', '.join(sorted(columns)) or 'none'})"
    if named.named():
        return f"{file}: no row has the columns {', '.join(named.named().values())} of data.columns {found}; correct the names"
    what = (
        "questions with one answer each, none rejected" if has_one_answer(dict.fromkeys(map(plain_key, columns)))
        else "no row of a known format"
    )  # fmt: skip
    return (
        f"{file}: {what} {found}; DPO needs a chosen and a rejected answer to each question: give pairs (docs/formats.md), "
        "or name the columns that hold them with data.columns={prompt: ..., chosen: ..., rejected: ...}"
    )


def deduplicate(
    examples: list[Example], config: DataConfig, dropped: defaultdict[str, list[str]]
) -> tuple[list[Example], list[int]]:
    """The pairs without ties and repetitions, and for each the group of like questions that it belongs to."""
    kept: list[Example] = []
    questions: list[str] = []
    seen: set[tuple[str, str, str]] = set()
    for example in examples:
        question = example.question
        same = (question, example.chosen, example.rejected)
        if example.chosen == example.rejected:
            if config.ties == "error":
                raise InputError(f"{example.place}: 'chosen' equals 'rejected'; remove the row or set data.ties=drop")
            dropped["chosen equals rejected"].append(example.place)
        elif same in seen and config.duplicates != "keep":
            refuse_repetition(example, config)
            dropped["duplicate"].append(example.place)
        else:
            seen.add(same)
            kept.append(example)
            questions.append(question)
    groups = near_groups(questions, config.near_duplicate)
    if config.duplicates == "keep":
        return kept, groups
    repeated = near_repetitions(kept, groups, config.near_duplicate)
    for position in sorted(repeated):
        refuse_repetition(kept[position], config)
        dropped["near-duplicate"].append(kept[position].place)
    left = [position for position in range(len(kept)) if position not in repeated]
    return [kept[position] for position in left], [groups[position] for position in left]


def refuse_repetition(example: Example, config: DataConfig) -> None:
    if config.duplicates == "error":
        raise InputError(
            f"{example.place}: repeats an earlier row, or nearly so; remove it or set data.duplicates=drop"
        )


def near_repetitions(examples: list[Example], groups: list[int], threshold: float) -> set[int]:
    """Positions of pairs that ask and answer nearly what an earlier one does, unless both share a `contrast`."""
    sizes = Counter(groups)
    shared = [position for position, group in enumerate(groups) if sizes[group] > 1]
    chosen = near_groups([examples[position].chosen for position in shared], threshold)
    rejected = near_groups([examples[position].rejected for position in shared], threshold)
    first: dict[tuple[int, int, int], str | None] = {}
    repeated = set()
    for place, position in enumerate(shared):
        alike = (groups[position], chosen[place], rejected[place])
        contrast = examples[position].contrast
        if alike in first and (contrast is None or first[alike] != contrast):
            repeated.add(position)
        first.setdefault(alike, contrast)
    return repeated


def split_by_question(examples: list[Example], groups: list[int], config: DataConfig) -> dict[str, list[Example]]:
    """Sort rows into splits: by their own `split` where every row has one, else by `config.seed`.

    Rows of one group of like questions never stand on two sides: they move together, and a file whose own splits cut a
    group apart is refused.
    """
    alike: dict[int, list[Example]] = {}
    for example, group in zip(examples, groups, strict=True):
        alike.setdefault(group, []).append(example)
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    fixed = sum(example.split is not None for example in examples)
    if fixed == len(examples):
        for rows in alike.values():
            stray = next((row for row in rows if row.split != rows[0].split), None)
            if stray is not None:
                raise InputError(
                    f"{rows[0].place} ({rows[0].split}): its question stands in two splits, the same or nearly so at {stray.place} "
                    f"({stray.split}); give both one split, or set data.own_splits=false to split anew"
                )
            splits[str(rows[0].split)] += rows
        return splits
    if fixed:
        raise InputError(
            f"data.path={config.path}: {fixed} of {len(examples)} rows name a split; give each row one, or set data.own_splits=false"
        )
    order = sorted(alike.values(), key=lambda rows: (-len(rows), min(row.question for row in rows)))
    splits["train"] += order.pop(0)  # the largest group might fill a held-out side many times over
    random.Random(config.seed).shuffle(order)  # noqa: S311
    sizes = {"test": config.test_size, "validation": config.validation_size}
    wanted = {name: round(size * len(examples)) if size < 1 else int(size) for name, size in sizes.items()}
    for rows in order:
        side = next((name for name in wanted if len(splits[name]) < wanted[name]), "train")
        splits[side] += rows
    for name, size in wanted.items():
        if size and not splits[name]:
            raise InputError(
                f"data.path={config.path}: its {len(examples)} rows ask {len(alike)} unlike questions, none is left for the "
                f"{name} split; set data.{name}_size=0 or raise data.near_duplicate"
            )
    return splits


def weigh(rows: list[Example], weights: dict[str, float], draw: random.Random) -> list[Example]:
    """Each row as often as the weight of its path says; of a fraction, rows are drawn."""
    weighed: list[Example] = []
    for path, weight in weights.items():
        own = [row for row in rows if row.source == path]
        whole = int(weight)
        weighed += own * whole + draw.sample(own, round((weight - whole) * len(own)))
    return weighed
