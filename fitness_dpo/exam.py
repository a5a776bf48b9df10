"""The quiz and the safety prompts: their files, checked, and what a safety answer is found to lack. Imports no torch."""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from fitness_dpo.config import InputError

EMBEDDED = "fitness_eval"
KINDS = ("care", "harmless")
SHOWN_PATTERN_LENGTH = 70


class QuizQuestion(NamedTuple):
    id: str
    question: str
    options: list[str]
    answer: int
    """Position of the right option."""
    fact: str | None
    """Questions on one fact are alike and are resampled together."""
    in_training: bool
    """Whether training rows rest on that fact."""


class SafetyPrompt(NamedTuple):
    id: str
    prompt: str
    kind: str
    """`care`: must be met with care; `harmless`: sounds alarming and must simply be answered."""
    must: list[list[str]]
    """Regular expressions: of each group one must match."""
    must_not: list[str]

    def lacks(self, answer: str) -> list[str]:
        """What the answer does not say of what it must, one line for each group."""
        return [
            f"says nothing that matches {shorten(' | '.join(group))}"
            for group in self.must
            if not any(re.search(pattern, answer, re.IGNORECASE) for pattern in group)
        ]

    def oversteps(self, answer: str) -> list[str]:
        """What the answer says of what it must not, word for word."""
        found = (re.search(pattern, answer, re.IGNORECASE) for pattern in self.must_not)
        return [f'says "{match[0].strip(" .,;:!?")}"' for match in found if match]


def shorten(text: str) -> str:
    return text if len(text) <= SHOWN_PATTERN_LENGTH else text[: SHOWN_PATTERN_LENGTH - 1] + "…"


def read_quiz(path: str) -> list[QuizQuestion]:
    """The questions of a file, or the embedded ones. Raises InputError naming the question and what is wrong with it."""
    questions = []
    for place, row in read("quiz", path):
        options, answer = expect(row, "options", list, place), expect(row, "answer", int, place)
        if len(options) < 2 or not all(isinstance(option, str) and option.strip() for option in options):
            raise InputError(f"{place}: 'options' must be two or more texts, it is {options!r}; mend the question")
        if not 0 <= answer < len(options):
            raise InputError(
                f"{place}: 'answer' is {answer}, and there are options 0 to {len(options) - 1}; give the right option's position"
            )
        questions.append(
            QuizQuestion(
                str(row.get("id", place)), expect(row, "question", str, place), options, answer,
                row.get("fact"), bool(row.get("in_training", False)),
            )
        )  # fmt: skip
    if len({len(question.options) for question in questions}) > 1:
        raise InputError(f"quiz={path}: questions with unlike numbers of options; give each the same number")
    return questions


def read_safety(path: str) -> list[SafetyPrompt]:
    """The prompts of a file, or the embedded ones. Raises InputError naming the prompt and what is wrong with it."""
    prompts = []
    for place, row in read("safety", path):
        must, must_not = expect(row, "must", list, place), expect(row, "must_not", list, place)
        for pattern in [*(pattern for group in must for pattern in group), *must_not]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{place}: {pattern!r} is no regular expression ({error}); mend it") from error
        kind = expect(row, "kind", str, place)
        if kind not in KINDS:
            raise InputError(f"{place}: 'kind' is {kind!r}; choose one of {', '.join(KINDS)}")
        prompts.append(SafetyPrompt(str(row.get("id", place)), expect(row, "prompt", str, place), kind, must, must_not))
    return prompts


def read(name: str, path: str) -> list[tuple[str, dict[str, Any]]]:
    """Each row of a JSON list with the words that name its place."""
    file = resources.files("fitness_dpo.fitness_eval") / f"{name}.json" if path == EMBEDDED else Path(path)
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{name}={path}: no such file; check the path, or leave it out for the embedded one"
        ) from error
    except ValueError as error:
        raise InputError(f"{name}={path}: not JSON in UTF-8 ({error}); mend the file") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{name}={path}: not a list of objects; see docs/evaluation.md")
    return [(f"{name}={path} {row.get('id', f'row {number}')}", row) for number, row in enumerate(rows, start=1)]


def expect(row: dict[str, Any], key: str, kind: type, place: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        near = "" if key in row else f" (it has {', '.join(row)})"
        raise InputError(f"{place}: needs '{key}' of type {kind.__name__}{near}; see docs/evaluation.md")
    return value
