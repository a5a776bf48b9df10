"""The shapes a preference row comes in. Adding one is an entry in FORMATS and an example in tests/formats.jsonl."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fitness_dpo.pairs import ABSENT, QUESTION_KEYS, Pair, Row, RowError, number, to_pair

Sides = list[tuple[Any, Any]]  # better and worse answer as the row holds them, or ABSENT

ANSWER_KEYS = ("answer", "output", "response", "responses", "completion", "messages", "conversations", "conversation")
WINNER_KEYS = ("ranking", "winner", "preference", "best", "chosen")


class Format(NamedTuple):
    name: str
    matches: Callable[[Row], Any]
    sides: Callable[[Row], Sides]

    def read(self, row: Row) -> list[Pair]:
        """The row's pairs, the widest gap of a ranking first. Raises RowError."""
        sides = self.sides(row)
        if not sides:
            raise RowError("with a tie for the better answer")
        return [to_pair(row, better, worse) for better, worse in sides]


def _has(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(key in row for key in keys)


def _two(chosen: str, rejected: str) -> Callable[[Row], Sides]:
    return lambda row: [(row[chosen], row[rejected])]


def _ranked(scored: list[tuple[float, Any]]) -> Sides:
    """Every two answers of unlike score, the widest gap first."""
    apart = [(high, low) for high, low in itertools.permutations(scored, 2) if high[0] > low[0]]
    apart.sort(key=lambda two: two[1][0] - two[0][0])
    return [(high[1], low[1]) for high, low in apart]


def _by_score(answers: tuple[str, str], scores: tuple[str, str]) -> Callable[[Row], Sides]:
    return lambda row: _ranked(
        [(number(row[score], score), row[answer]) for answer, score in zip(answers, scores, strict=True)]
    )


def _by_index(answers: str, key: str) -> Callable[[Row], Sides]:
    def sides(row: Row) -> Sides:
        better = int(number(row[key], key))
        if better not in (0, 1):
            raise RowError(f"{key} is neither 0 nor 1")
        return [(row[f"{answers}{better}"], row[f"{answers}{1 - better}"])]

    return sides


def _by_letter(answers: str) -> Callable[[Row], Sides]:
    """Answers A, B, C ... and a column that names the winner (`A`, `model_a`) or ranks them (`A>C>B`)."""

    def sides(row: Row) -> Sides:
        letters = {key[-1]: row[key] for key in row if re.fullmatch(answers + "[a-z]", key) and row[key] is not None}
        key = next(key for key in WINNER_KEYS if key in row)
        verdict = re.sub(r"model|response|conversation|[\s_\[\]]", "", str(row[key]).lower())
        tiers = [tier.split("=") for tier in verdict.split(">")]
        named = [letter for tier in tiers for letter in tier]
        if "tie" in verdict:
            return []
        if not set(named) <= letters.keys():
            raise RowError(f"{key} names none of the answers")
        rest = [letter for letter in letters if letter not in named]
        places = [*tiers, rest] if len(named) == 1 else tiers
        return _ranked([(-place, letters[letter]) for place, tier in enumerate(places) for letter in tier])

    return sides


def _shp(row: Row) -> Sides:
    both = (row["human_ref_a"], row["human_ref_b"])
    return [both if number(row["labels"], "labels") == 1 else both[::-1]]


def _nectar(row: Row) -> Sides:
    return _ranked([(-number(answer["rank"], "rank"), answer["answer"]) for answer in row["answers"]])


def _ultrafeedback(row: Row) -> Sides:
    return _ranked(
        [(number(each.get("overall_score"), "overall_score"), each.get("response")) for each in row["completions"]]
    )


def _holds(key: str, *inner: str) -> Callable[[Row], bool]:
    """Whether the column is a list of objects that have these keys."""
    return lambda row: (
        isinstance(rows := row.get(key), list)
        and all(isinstance(each, Mapping) and all(name in each for name in inner) for each in rows or [None])
    )


def _roles_in_turns(row: Row) -> Sides:
    marked = [(str(turn.get("from", turn.get("role"))), turn) for turn in row["conversations"]]
    answers = [
        [turn.get("value", turn.get("content")) for role, turn in marked if role.startswith(side)]
        for side in ("chosen", "rejected")
    ]
    return [(answers[0][0], answers[1][0])]


def _marks_answers(row: Row) -> bool:
    turns = row.get("conversations")
    roles = (
        [str(turn.get("from", turn.get("role"))) for turn in turns] if _holds("conversations")(row) and turns else []
    )
    return all(any(role.startswith(side) for role in roles) for side in ("chosen", "rejected"))


def _labelled(answer: str) -> Callable[[Row], Sides]:
    def sides(row: Row) -> Sides:
        label = str(row.get("label", row.get("kto_tag"))).strip().lower()
        if label not in ("true", "false", "1", "0"):
            raise RowError("label is neither true nor false")
        return [(row[answer], ABSENT) if label in ("true", "1") else (ABSENT, row[answer])]

    return sides


def _has_label(answer: str) -> Callable[[Row], bool]:
    return lambda row: answer in row and ("label" in row or "kto_tag" in row)


def _has_letters(answers: str) -> Callable[[Row], bool]:
    return lambda row: f"{answers}a" in row and f"{answers}b" in row and any(key in row for key in WINNER_KEYS)


FORMATS = (
    Format(
        "input / preferred_output / non_preferred_output",
        _has("preferred_output", "non_preferred_output"),
        _two("preferred_output", "non_preferred_output"),
    ),
    Format(
        "chosen_messages / rejected_messages",
        _has("chosen_messages", "rejected_messages"),
        _two("chosen_messages", "rejected_messages"),
    ),
    Format(
        "chosen_response / rejected_response",
        _has("chosen_response", "rejected_response"),
        _two("chosen_response", "rejected_response"),
    ),
    Format("response_j / response_k", _has("response_j", "response_k"), _two("response_j", "response_k")),
    Format("pos / neg", _has("pos", "neg"), _two("pos", "neg")),
    Format("human_ref_A / human_ref_B / labels", _has("human_ref_a", "human_ref_b", "labels"), _shp),
    Format(
        "response_0 / response_1 / better_response_id",
        _has("response_0", "response_1", "better_response_id"),
        _by_index("response_", "better_response_id"),
    ),
    Format(
        "answer_0 / answer_1 with scores",
        _has("answer_0", "answer_1", "score_0", "score_1"),
        _by_score(("answer_0", "answer_1"), ("score_0", "score_1")),
    ),
    Format("response_a / response_b with a winner or ranking", _has_letters("response_"), _by_letter("response_")),
    Format("conversation_a / conversation_b with a winner", _has_letters("conversation_"), _by_letter("conversation_")),
    Format(
        "messages / rejected_response", _has("messages", "rejected_response"), _two("messages", "rejected_response")
    ),
    Format(
        "messages / rejected_messages", _has("messages", "rejected_messages"), _two("messages", "rejected_messages")
    ),
    Format("answers with ranks", _holds("answers", "answer", "rank"), _nectar),
    Format("completions with scores", _holds("completions", "response", "overall_score"), _ultrafeedback),
    *(
        Format(f"{key} / chosen / rejected", _has(key, "chosen", "rejected"), _two("chosen", "rejected"))
        for key in QUESTION_KEYS
    ),
    Format("chosen / rejected, the question inside", _has("chosen", "rejected"), _two("chosen", "rejected")),
    Format(
        "output ranked from best to worst",
        lambda row: isinstance(row.get("output"), list),
        lambda row: _ranked([(-place, answer) for place, answer in enumerate(row["output"])]),
    ),
    Format("conversations with chosen and rejected roles", _marks_answers, _roles_in_turns),
    *(
        Format(f"{answer} / label", _has_label(answer), _labelled(answer))
        for answer in ("completion", "response", "output", "messages", "conversations")
    ),
)


@functools.lru_cache(maxsize=1000)
def plain_key(key: str) -> str:
    return "_".join(str(key).strip().lower().split())


def recognise(row: Row) -> Format | None:
    """The first format whose keys the row has; the keys are those of `plain_key`."""
    return next((candidate for candidate in FORMATS if candidate.matches(row)), None)


def has_one_answer(row: Row) -> bool:
    """Whether the row looks like plain question-answer data."""
    return any(key in row for key in ANSWER_KEYS)
