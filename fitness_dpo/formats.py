"""The shapes a preference row comes in. Adding one is an entry in FORMATS and an example in tests/formats.jsonl."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Turn = tuple[str, str]  # role, content

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip


class RowError(ValueError):
    """This row cannot be used; the message is the reason it is counted under."""


class Pair(NamedTuple):
    turns: list[Turn]
    """The conversation up to the answer: an optional system turn, then user and assistant turns, a user turn last."""
    chosen: str
    rejected: str


class Format(NamedTuple):
    name: str
    matches: Callable[[Row], bool]
    read: Callable[[Row], Pair]


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    if isinstance(value, (bool, int, float)):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"{key} is {'missing' if value is None else 'no text'}")
    return value


def _turns(messages: Any, key: str) -> list[Turn]:
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, Mapping):
            raise RowError(f"{key} holds something that is no message")
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if role not in ROLES:
            raise RowError(f"{key} has a turn of role {role!r}")
        if not isinstance(content, str):
            raise RowError(f"{key} has a turn without text")
        turns.append((ROLES[role], content))
    return turns


def _prompt_turns(row: Row, key: str) -> list[Turn]:
    system = [("system", _text(row, "system"))] if row.get("system") else []
    if isinstance(row[key], list):
        return system + _turns(row[key], key)
    return [*system, ("user", _text(row, key))]


def _answer(row: Row, key: str) -> str:
    if isinstance(row.get(key), (list, Mapping)):
        turns = _turns(row[key], key)
        if not turns or turns[-1][0] != "assistant":
            raise RowError(f"{key} does not end with an assistant turn")
        return turns[-1][1]
    return _text(row, key)


def _explicit(key: str) -> Callable[[Row], Pair]:
    return lambda row: Pair(_prompt_turns(row, key), _answer(row, "chosen"), _answer(row, "rejected"))


def _implicit(row: Row) -> Pair:
    chosen, rejected = _turns(row["chosen"], "chosen"), _turns(row["rejected"], "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise RowError("chosen and rejected answer different prompts")
    return Pair(chosen[:-1], _answer(row, "chosen"), _answer(row, "rejected"))


def _has(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(key in row for key in keys)


FORMATS = (
    Format("question / chosen / rejected", _has("question", "chosen", "rejected"), _explicit("question")),
    Format("prompt / chosen / rejected", _has("prompt", "chosen", "rejected"), _explicit("prompt")),
    Format(
        "chosen / rejected conversations",
        lambda row: isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list),
        _implicit,
    ),
)


def recognise(row: Row) -> Format | None:
    """The first format whose keys the row has."""
    return next((candidate for candidate in FORMATS if candidate.matches(row)), None)
