"""Any preference file -> clean pairs, split by question. Imports no torch."""

import hashlib
import html
import importlib.resources
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fitness_dpo.config import DataConfig, InputError
from fitness_dpo.formats import FORMATS, RowError, recognise

EMBEDDED = "fitness_qa"
SPLITS = ("train", "validation", "test")
Message = dict[str, str]


class Example(NamedTuple):
    id: str
    prompt: list[Message]
    """Messages up to the answer; the last is the user's."""
    chosen: str
    rejected: str
    topic: str = ""
    flaw: str = ""
    split: str | None = None

    @property
    def question(self) -> str:
        """What a split must not cut apart: the user's words, whatever their case and spacing."""
        return " ".join(" ".join(m["content"] for m in self.prompt if m["role"] == "user").casefold().split())


class Preferences(NamedTuple):
    splits: dict[str, list[Example]]
    """train, validation and test, disjoint by question."""
    read: int
    dropped: Counter[str]
    """Rows left out, by reason."""

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each split's rows."""
        return {
            name: hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
            for name, rows in self.splits.items()
        }


def load_preferences(config: DataConfig) -> Preferences:
    """Read, clean and split the rows of `config.path`. Raises InputError naming the file and the mend."""
    dropped: Counter[str] = Counter()
    found_keys: set[str] = set()
    examples: list[Example] = []
    seen: set[tuple[str, str, str]] = set()
    read = 0
    for where, row in (pair for path in config.paths for pair in read_rows(path)):
        read += 1
        try:
            example = to_example(where, row, config)
        except RowError as reason:
            dropped[str(reason)] += 1
            found_keys |= row.keys() if isinstance(row, dict) else set()
            continue
        same = example.chosen == example.rejected
        repeated = (example.question, example.chosen, example.rejected) in seen
        if same and config.ties == "error":
            raise InputError(f"{where}: 'chosen' equals 'rejected'; remove the row or set data.ties=drop")
        if repeated and config.duplicates == "error":
            raise InputError(f"{where}: repeats an earlier row; remove it or set data.duplicates=drop")
        if same:
            dropped["chosen equals rejected"] += 1
        elif repeated and config.duplicates == "drop":
            dropped["duplicate"] += 1
        else:
            seen.add((example.question, example.chosen, example.rejected))
            examples.append(example)
    if not examples:
        raise InputError(no_rows_left(config, read, dropped, found_keys))
    splits = split_by_question(examples, config)
    if not splits["train"]:
        raise InputError(
            f"data.path={config.path}: no row is left to train on of {len(examples)}; lower data.test_size or data.validation_size"
        )
    keep = random.Random(config.seed)  # noqa: S311
    for name, limit in (("train", config.max_rows), ("validation", config.max_validation_rows)):
        if limit is not None and limit < len(splits[name]):
            splits[name] = keep.sample(splits[name], limit)
    return Preferences(splits, read, dropped)


def no_rows_left(config: DataConfig, read: int, dropped: Counter[str], found_keys: set[str]) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    keys = f" (keys found: {', '.join(sorted(found_keys))})" if found_keys else ""
    wanted = " or ".join(entry.name for entry in FORMATS)
    return f"data.path={config.path}: no usable row of {read}: {counts}{keys}; rows need {wanted}"


def to_example(where: str, row: Any, config: DataConfig) -> Example:
    """Recognise and clean one row. Raises RowError with the reason it must be left out."""
    if not isinstance(row, dict):
        raise RowError("not an object")
    entry = recognise(row)
    if entry is None:
        raise RowError("without the needed keys")
    turns, chosen, rejected = entry.read(row)
    clean = standardise if config.standardise else str.strip
    prompt = [{"role": role, "content": clean(content)} for role, content in turns]
    if not any(message["role"] == "system" for message in prompt) and config.system_prompt:
        prompt.insert(0, {"role": "system", "content": clean(config.system_prompt)})
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"]:
        raise RowError("without a question")
    chosen, rejected = clean(chosen), clean(rejected)
    if not chosen or not rejected:
        raise RowError(f"with an empty {'rejected' if chosen else 'chosen'} answer")
    split = row.get("split")
    return Example(
        id=str(row.get("id", where)), prompt=prompt, chosen=chosen, rejected=rejected,
        topic=str(row.get("topic", "")), flaw=str(row.get("flaw", "")), split=split if split in SPLITS else None,
    )  # fmt: skip


def standardise(text: str) -> str:
    """Unicode NFC, HTML entities resolved, Unix line ends, no control characters, no needless white space."""
    text = unicodedata.normalize("NFC", html.unescape(text))
    text = re.sub(r"\r\n?|[\u2028\u2029\x85]", "\n", text)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff]", "", text)
    text = re.sub(r"[\xa0\u202f]", " ", text)
    text = re.sub(r"(?<=\S)[ \t]+", " ", text)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_by_question(examples: list[Example], config: DataConfig) -> dict[str, list[Example]]:
    """Sort rows into splits: by their own `split` where every row has one, else by `config.seed`.

    One question never stands on two sides: rows of the same question move together, and a file whose own splits share
    one is refused.
    """
    questions: dict[str, list[Example]] = {}
    for example in examples:
        questions.setdefault(example.question, []).append(example)
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    fixed = sum(example.split is not None for example in examples)
    if fixed == len(examples):
        for rows in questions.values():
            if len({row.split for row in rows}) > 1:
                raise InputError(
                    f"data.path={config.path}: row {rows[0].id}'s question stands in two splits; give its rows one split"
                )
            splits[str(rows[0].split)] += rows
        return splits
    if fixed:
        raise InputError(
            f"data.path={config.path}: {fixed} of {len(examples)} rows name a split; give each row one, or none"
        )
    order = sorted(questions)
    random.Random(config.seed).shuffle(order)  # noqa: S311
    sizes = {"test": config.test_size, "validation": config.validation_size}
    wanted = {name: round(size * len(examples)) if size < 1 else int(size) for name, size in sizes.items()}
    for question in order:
        side = next((name for name in wanted if len(splits[name]) < wanted[name]), "train")
        splits[side] += questions[question]
    return splits


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Every row of a file, a folder of .json and .jsonl files, a hub dataset or the embedded set, with where it stands."""
    if path == EMBEDDED:
        files = importlib.resources.files("fitness_dpo.fitness_qa")
        for file in sorted(files.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".json") and file.name != "facts.json":
                yield from parse_rows(f"{EMBEDDED}/{file.name}", file.read_bytes())
    elif Path(path).is_dir():
        inside = sorted(file for file in Path(path).iterdir() if file.suffix in (".json", ".jsonl"))
        if not inside:
            raise InputError(f"data.path={path}: no .json or .jsonl file in this folder; name another")
        for file in inside:
            yield from parse_rows(str(file), file.read_bytes())
    elif Path(path).is_file():
        yield from parse_rows(path, Path(path).read_bytes())
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.endswith((".json", ".jsonl")):
        yield from read_hub_rows(path)
    else:
        raise InputError(f"data.path={path}: no such file; check the path, or name a hub dataset as org/name")


def read_hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(
            f"data.path={name}: neither a file here nor reachable on the hub ({type(error).__name__}); "
            "check the name and the network, or give a JSON file"
        ) from error
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            yield f"{name} {split} row {number}", ({"split": split, **row} if len(splits) > 1 else row)


def parse_rows(where: str, content: bytes) -> Iterable[tuple[str, Any]]:
    """Rows of a JSON list, of an object that holds one, or of JSON lines."""
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"{where}: a Git LFS pointer, not the data itself; run git lfs pull")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{where}: UTF-16 text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    if not text.strip():
        raise InputError(f"{where}: the file is empty; give one with rows")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        return parse_lines(where, text, error)
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = [whole] if recognise(whole) or not lists else max(lists, key=len)
    if not isinstance(whole, list):
        raise InputError(f"{where}: holds {type(whole).__name__}, not rows; give a list of objects")
    return ((f"{where} row {number}", row) for number, row in enumerate(whole, 1))


def parse_lines(where: str, text: str, as_json: json.JSONDecodeError) -> Iterator[tuple[str, Any]]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for position, (number, line) in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if position == 0:
                raise InputError(f"{where} line {as_json.lineno}: not JSON ({as_json.msg}); mend the file") from error
            raise InputError(f"{where} line {number}: not JSON ({error.msg}); mend or remove the line") from error
        yield f"{where} line {number}", row
