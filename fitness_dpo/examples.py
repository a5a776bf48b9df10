"""One row of any format -> cleaned Examples. Imports no torch."""

import re
from collections import defaultdict
from typing import Any, NamedTuple

from fitness_dpo.cleaning import encodable, standardise
from fitness_dpo.config import ColumnsConfig, DataConfig
from fitness_dpo.duplicates import words
from fitness_dpo.formats import Format, plain_key, recognise
from fitness_dpo.pairs import Row, RowError

SPLITS = ("train", "validation", "test")
SPLIT_NAME = re.compile(
    r"(?:(train)|(validation|valid|val|dev|eval)|(test))(?![a-z])"
)  # test_prefs is a test split too
Message = dict[str, str]


class Example(NamedTuple):
    id: str
    prompt: list[Message]
    """Messages up to the answer; the last is the user's."""
    chosen: str
    rejected: str
    """Empty, as `chosen` may be, in a row that labels one answer and waits for its counterpart."""
    topic: str = ""
    flaw: str = ""
    split: str | None = None
    contrast: str | None = None
    """Rows that share it are alike on purpose: the same question asked by two unlike persons."""
    source: str = ""
    """The entry of `data.path` it came from."""
    place: str = ""
    """Where in it: file and line or row."""

    @property
    def question(self) -> str:
        """What a split must not cut apart: the user's words, whatever their case, spacing and punctuation."""
        text = " ".join(message["content"] for message in self.prompt if message["role"] == "user")
        return " ".join(words(text)) or text


def known_row(row: Any, columns: ColumnsConfig) -> tuple[Format, Row]:
    """The row's format and the row under the keys that the format knows. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("not an object")
    if named := columns.named():
        if not all(column in row for column in named.values()):
            raise RowError("without the columns of data.columns")
        about = {key: row[key] for key in ("id", "topic", "flaw", "split", "contrast", "history") if key in row}
        row = about | {key: row[column] for key, column in named.items()}
    else:
        row = {plain_key(key): value for key, value in row.items()}
    entry = recognise(row)
    if entry is None:
        raise RowError("without the needed keys")
    return entry, row


def to_example(where: str, row: Any, config: DataConfig) -> Example:
    """The first pair of one row, recognised and cleaned. Raises RowError with the reason it must be left out."""
    return to_examples(where, *known_row(row, config.columns), config)[0]


def to_examples(where: str, entry: Format, row: Row, config: DataConfig, source: str = "") -> list[Example]:
    """The cleaned pairs of one row. Raises RowError with the reason it must be left out."""
    clean = standardise if config.standardise else encodable
    system_prompt = clean(config.system_prompt or "")
    split = SPLIT_NAME.match(str(row.get("split")).lower()) if config.own_splits else None
    examples = []
    for turns, *answers in entry.read(row):
        prompt = [{"role": role, "content": clean(content)} for role, content in turns]
        if system_prompt and prompt[:1] and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": system_prompt})
        if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"]:
            raise RowError("without a question")
        chosen, rejected = (None if answer is None else clean(answer) for answer in answers)
        if "" in (chosen, rejected):
            raise RowError(f"with an empty {'chosen' if chosen == '' else 'rejected'} answer")
        examples.append(
            Example(
                id=where if row.get("id") is None else str(row["id"]),
                prompt=prompt,
                chosen=chosen or "",
                rejected=rejected or "",
                topic=str(row.get("topic") or ""),
                flaw=str(row.get("flaw") or ""),
                split=SPLITS[split.lastindex - 1] if split and split.lastindex else None,
                contrast=str(row["contrast"]) if row.get("contrast") else None,
                source=source,
                place=where,
            )
        )
    return examples


def pair_up(examples: list[Example], dropped: defaultdict[str, list[str]]) -> list[Example]:
    """Join each answer labelled good with one labelled bad to the same prompt; drop those that stay alone."""
    paired = [example for example in examples if example.chosen and example.rejected]
    waiting: dict[str, tuple[list[Example], list[Example]]] = {}
    for example in examples:
        if not (example.chosen and example.rejected):
            waiting.setdefault(repr(example.prompt), ([], []))[example.chosen == ""].append(example)
    for good, bad in waiting.values():
        paired += [one._replace(rejected=other.rejected) for one, other in zip(good, bad, strict=False)]
        alone = good[len(bad) :] + bad[len(good) :]
        if alone:
            dropped["with one labelled answer and no counterpart"] += [example.place for example in alone]
    return paired
