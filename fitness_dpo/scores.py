"""The items of an evaluation -> its metrics, with intervals. Imports no torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fitness_dpo.data import Example
from fitness_dpo.exam import QuizQuestion, SafetyPrompt
from fitness_dpo.items import Items
from fitness_dpo.measures import bootstrap, mcnemar, per_answer
from fitness_dpo.yardstick import right_by_answers_alone

Scores = dict[str, Any]
Column = NDArray[np.float64]
SIDES = ("base", "tuned")


def interval(values: ArrayLike, groups: Sequence[str]) -> dict[str, float] | None:
    """{"value", "low", "high"} of the mean, or None where there is nothing to take the mean of."""
    return bootstrap(values, groups)._asdict() if len(groups) else None


def both(columns: dict[str, dict[str, Column]], groups: Sequence[str]) -> Scores:
    """Interval of each measure for each side, and of tuned - base. columns: side -> measure -> (items,)."""
    scores: Scores = dict.fromkeys(SIDES)
    for side, measures in columns.items():
        scores[side] = {name: interval(values, groups) for name, values in measures.items()}
    scores["difference"] = None
    if len(columns) == len(SIDES):
        tuned, base = columns["tuned"], columns["base"]
        scores["difference"] = {name: interval(tuned[name] - base[name], groups) for name in tuned}
    return scores


def measured_sides(items: Items, kind: str) -> list[str]:
    return [side for side in SIDES if (kind, side) in items.records]


def preference(items: Items, rows: Sequence[Example], train: Sequence[Example], beta: float | None) -> Scores:
    """Held-out preference. Rewards are beta * (log-probability tuned - base), summed over an answer's tokens (DPO, eq. 5)."""
    groups = [row.contrast or row.question for row in rows]
    logps = {side: np.array(items.column("preference", side, "logps")) for side in measured_sides(items, "preference")}
    tokens = np.array(items.column("preference", "tuned", "tokens"))

    def favours(values: NDArray[np.float64]) -> Column:
        return (values[:, 0] > values[:, 1]).astype(np.float64)

    scores = both(
        {
            side: {"logp_accuracy": favours(values), "logp_per_token_accuracy": favours(values / tokens)}
            for side, values in logps.items()
        },
        groups,
    )
    scores["margins"] = {
        name: (logps[side][:, 0] - logps[side][:, 1]).tolist() if side in logps else None
        for name, side in (("before", "base"), ("after", "tuned"))
    }
    scores |= dict.fromkeys(("accuracy", "margin", "chosen_change", "rejected_change", "tfidf"))
    scores |= {"by_topic": {}, "by_flaw": {}}
    if "base" not in logps or beta is None:
        return scores
    change = logps["tuned"] - logps["base"]
    right, margin = favours(change), beta * (change[:, 0] - change[:, 1])
    scores |= {
        "accuracy": interval(right, groups),
        "margin": interval(margin, groups),
        "chosen_change": interval(change[:, 0], groups),
        "rejected_change": interval(change[:, 1], groups),
    }
    for key in ("topic", "flaw"):
        names = [getattr(row, key) for row in rows]
        for name in sorted({*names} - {""}):
            held = [place for place, own in enumerate(names) if own == name]
            own_groups = [groups[place] for place in held]
            scores[f"by_{key}"][name] = {
                "rows": len(held),
                "accuracy": interval(right[held], own_groups),
                "margin": interval(margin[held], own_groups),
            }
    answers_alone = right_by_answers_alone(train, rows)
    if answers_alone is not None:
        scores["tfidf"] = {
            "accuracy": interval(answers_alone, groups),
            "difference": interval(right - answers_alone, groups),
            "training_rows": len(train),
        }
    return scores


def quiz(items: Items, questions: Sequence[QuizQuestion]) -> Scores:
    """The share of questions whose right option is the likeliest, by log-probability and by log-probability a byte."""
    answers = np.array([question.answer for question in questions])
    lengths = np.array([[len(option.encode()) for option in question.options] for question in questions])
    right: dict[str, dict[str, Column]] = {}
    for side in measured_sides(items, "quiz"):
        logps = np.array(items.column("quiz", side, "logps"))
        right[side] = {
            "raw": (logps.argmax(1) == answers).astype(np.float64),
            "per_byte": ((logps / lengths).argmax(1) == answers).astype(np.float64),
        }

    def part(held: list[int]) -> Scores:
        columns = {side: {name: values[held] for name, values in own.items()} for side, own in right.items()}
        scores = both(columns, [questions[place].fact or questions[place].id for place in held])
        scores["questions"] = len(held)
        scores["p_value"] = None
        if len(columns) == len(SIDES):
            scores["p_value"] = {
                name: mcnemar(columns["base"][name], columns["tuned"][name]) for name in columns["tuned"]
            }
        return scores

    seen = [place for place, question in enumerate(questions) if question.in_training]
    unseen = [place for place, question in enumerate(questions) if not question.in_training]
    return part(list(range(len(questions)))) | {"in_training": part(seen), "unseen": part(unseen)}


def safety(items: Items, prompts: Sequence[SafetyPrompt]) -> Scores:
    """Prompts met with care, harmless ones answered, harmless ones refused; every failure of the tuned side word for word."""
    kinds = {
        kind: [place for place, prompt in enumerate(prompts) if prompt.kind == kind] for kind in ("care", "harmless")
    }
    scores: Scores = dict.fromkeys(SIDES)
    passed: dict[str, dict[str, dict[str, Column]]] = {"care": {}, "harmless": {}}
    failures = []
    for side in measured_sides(items, "safety"):
        answers = items.column("safety", side, "answer")
        oversteps = [prompt.oversteps(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        lacks = [prompt.lacks(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        well = np.array([not over and not lack for over, lack in zip(oversteps, lacks, strict=True)], dtype=np.float64)
        over = np.array([bool(found) for found in oversteps], dtype=np.float64)
        passed["care"][side] = {"care_passed": well[kinds["care"]]}
        passed["harmless"][side] = {"answered": well[kinds["harmless"]], "over_refused": over[kinds["harmless"]]}
        if side == "tuned":
            failures = [
                {
                    "id": prompt.id, "kind": prompt.kind, "prompt": prompt.prompt, "answer": answers[place],
                    "why": "; ".join(oversteps[place] + lacks[place]),
                }
                for place, prompt in enumerate(prompts) if not well[place]
            ]  # fmt: skip
    parts = [both(columns, [prompts[place].id for place in kinds[kind]]) for kind, columns in passed.items()]
    for name in (*SIDES, "difference"):
        found = [part[name] for part in parts if part[name] is not None]
        scores[name] = {key: value for part in found for key, value in part.items()} or None
    return scores | {"prompts": {kind: len(held) for kind, held in kinds.items()}, "failures": failures}


def degeneration(items: Items) -> Scores:
    """Means over all answers of a side, and the interval of tuned - base."""
    columns: dict[str, dict[str, Column]] = {}
    answers: list[str] = []
    for side in measured_sides(items, "safety"):
        kinds = ("safety", "side_by_side")
        answers = [answer for kind in kinds for answer in items.column(kind, side, "answer")]
        columns[side] = per_answer(answers, [ended for kind in kinds for ended in items.column(kind, side, "ended")])
    scores = both(columns, [str(place) for place in range(len(answers))])
    for side in columns:
        scores[side] = {name: found["value"] for name, found in scores[side].items()}
    return scores | {"answers": len(answers)}


def side_by_side(items: Items, questions: Sequence[Example]) -> list[Scores]:
    """The same questions answered by both, with the answer that the row holds for good."""
    answers = {side: items.column("side_by_side", side, "answer") for side in measured_sides(items, "side_by_side")}
    return [
        {
            "id": row.id, "topic": row.topic, "prompt": row.prompt[-1]["content"], "reference": row.chosen,
            **{side: answers[side][place] if side in answers else None for side in SIDES},
        }
        for place, row in enumerate(questions)
    ]  # fmt: skip
