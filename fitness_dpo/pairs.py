"""One row's question and answers, in whatever shape they come -> a Pair of texts. Imports no torch."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fitness_dpo.transcripts import ROLES, TEMPLATE_TOKEN, Turn, parse, strip_ending

Row = Mapping[str, Any]
ABSENT = object()  # the other answer of a row that labels a single one

QUESTION_KEYS = (
    "prompt", "question", "instruction", "query", "input", "messages", "conversations", "conversation", "history",
)  # fmt: skip


class RowError(ValueError):
    """This row cannot be used; the message is the reason it is counted under."""


class Pair(NamedTuple):
    turns: list[Turn]
    """The conversation up to the answer: an optional system turn, then user and assistant turns, a user turn last."""
    chosen: str | None
    rejected: str | None
    """One of the two is None where the row has no such answer (ABSENT)."""


def to_pair(row: Row, better: Any, worse: Any) -> Pair:
    """The row's question with two of its answers: texts, messages or whole conversations. Raises RowError."""
    before, chosen = _answer(better, "chosen")
    before_rejected, rejected = _answer(worse, "rejected")
    if before and before_rejected and before != before_rejected:
        raise RowError("with answers to different prompts")
    before = before or before_rejected
    if not before and isinstance(chosen, str) and isinstance(rejected, str) and not _question_key(row):
        before, chosen, rejected = _common_prefix(chosen, rejected)
    starts_whole = bool(before) and before[0][0] != "assistant"
    turns = before if starts_whole else [*_question(row), *before]
    if not any(role == "system" for role, _ in turns) and (system := row.get("system") or row.get("system_prompt")):
        turns = [("system", _text(system, "system")), *turns]
    for text in (chosen, rejected, *(content for _, content in turns)):
        if text is not None and ("<" in text or "[" in text) and TEMPLATE_TOKEN.search(text):
            raise RowError("with template tokens that form no conversation")
    return Pair(turns, chosen, rejected)


def _answer(value: Any, name: str) -> tuple[list[Turn], str | None]:
    """The turns before an answer that brings them along, and the answer."""
    if value is ABSENT:
        return [], None
    if isinstance(value, (list, Mapping)):
        turns = _messages(value, name)
    else:
        text = _text(value, name)
        turns = parse(text) or [("assistant", strip_ending(text))]
    if not turns or turns[-1][0] != "assistant":
        raise RowError(f"{name} does not end with an assistant turn")
    before = turns[:-1]
    if before and not any(role == "user" for role, _ in before):
        raise RowError(f"{name} holds several turns and no question")
    return before, turns[-1][1]


def _common_prefix(chosen: str, rejected: str) -> tuple[list[Turn], str, str]:
    """What two texts open with alike is the question: up to its last sentence or line, else its last word."""
    length = next(
        (place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    ends = [match.end() for match in re.finditer(r"[?!.:](?=\s)|\n|[。？！]", chosen[:length])]
    cut = ends[-1] if ends else chosen.rfind(" ", 0, length) + 1
    if not chosen[:cut].strip():
        raise RowError("without a question")
    return [("user", chosen[:cut].strip())], chosen[cut:], rejected[cut:]


def _question_key(row: Row) -> str | None:
    return next((key for key in QUESTION_KEYS if row.get(key)), None)


def _question(row: Row) -> list[Turn]:
    key = _question_key(row)
    if key is None:
        raise RowError("without a question")
    value = row[key]
    if isinstance(value, Mapping):
        value = value.get("messages") or value.get("full_text") or value
    if isinstance(value, (list, Mapping)):
        marked = ("chosen", "rejected") if key == "conversations" else ()
        return _messages(value, key, marked)
    text = _text(value, key)
    if key == "instruction" and row.get("input"):
        text += "\n" + _text(row["input"], "input")
    return [*_history(row, key), *(parse(text) or [("user", text)])]


def _history(row: Row, key: str) -> list[Turn]:
    """Earlier exchanges, as lists of question and answer."""
    history = row.get("history")
    if not isinstance(history, list) or key == "history":
        return []
    if not all(isinstance(exchange, list) and len(exchange) == 2 for exchange in history):
        raise RowError("history is no list of question and answer")
    return [
        (role, _text(text, "history"))
        for exchange in history
        for role, text in zip(("user", "assistant"), exchange, strict=True)
    ]


def _messages(value: Any, key: str, skip: tuple[str, ...] = ()) -> list[Turn]:
    turns = []
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, Mapping):
            raise RowError(f"{key} holds something that is no message")
        role = str(message.get("role", message.get("from"))).lower()
        if skip and role.startswith(skip):
            continue
        if role not in ROLES:
            raise RowError(f"{key} has a turn of role {role!r}")
        content = message.get("content", message.get("value"))
        parts = content if isinstance(content, list) else [content]
        turns.append((ROLES[role], strip_ending("".join(_part(part, key) for part in parts))))
    return turns


def _part(part: Any, key: str) -> str:
    if isinstance(part, Mapping):
        if part.get("type", "text") != "text":
            raise RowError(f"{key} has a part of type {part['type']!r}")
        part = next((part[name] for name in ("text", "value", "content") if name in part), None)
    return _text(part, key)


def _text(value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)) and value == value:  # NaN stands for a missing value
        return str(value)
    raise RowError(f"{key} is {'no text' if value is not None and value == value else 'missing'}")


def number(value: Any, key: str) -> float:
    """The value of a column of scores, ranks or labels. Raises RowError."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RowError(f"{key} is no number") from None
