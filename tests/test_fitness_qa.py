"""The embedded preference set, quiz and safety prompts keep what the data card promises."""

import importlib.util
import re
from collections import Counter
from typing import Any

import pytest

from tests.conftest import ROOT, read_json

FOLDER = ROOT / "data" / "fitness_qa"
EVALUATION = ROOT / "data" / "fitness_eval"
ROWS: list[dict[str, Any]] = [
    row for file in sorted(FOLDER.glob("*.json")) if file.stem != "facts" for row in read_json(file)
]
CARE = read_json(EVALUATION / "safety.json")
QUIZ = read_json(EVALUATION / "quiz.json")


@pytest.fixture(scope="module")
def shortcuts() -> Any:
    spec = importlib.util.spec_from_file_location("check_shortcuts", ROOT / "scripts" / "check_shortcuts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_answers_alone_do_not_give_chosen_away(shortcuts: Any) -> None:
    measures = shortcuts.measure(ROWS)
    beyond = {
        name: value
        for name, value in measures.items()
        if not shortcuts.LIMITS[name][0] <= value <= shortcuts.LIMITS[name][1]
    }
    assert not beyond


def test_a_set_that_gives_itself_away_is_caught(shortcuts: Any) -> None:
    """The check's own check: chosen answers that are longer and begin alike must fail it."""
    marked = [row | {"chosen": f"Great question, my friend. {row['chosen']}"} for row in ROWS]
    measures = shortcuts.measure(marked)
    assert measures["tfidf_accuracy"] > 0.95
    assert measures["length_accuracy"] > 0.56
    assert measures["commonest_opening"] == 1.0


def test_counts() -> None:
    flaws = Counter(row["flaw"] for row in ROWS)
    assert len(ROWS) == len({row["id"] for row in ROWS}) == 660
    assert all(flaws[name] >= 40 for name in (
        "wrong_fact", "ignores_context", "unsafe", "vague", "overclaims", "over_refuses"))  # fmt: skip
    assert sum(row["context"] for row in ROWS) >= 330
    contrast = Counter(row["contrast"] for row in ROWS if row["contrast"])
    assert len(contrast) >= 60
    assert set(contrast.values()) == {2}
    assert all(40 <= len(row[side].split()) <= 130 for row in ROWS for side in ("chosen", "rejected"))


def test_splits_hold_every_topic_and_flaw_and_cut_no_contrast_pair() -> None:
    sizes = Counter(row["split"] for row in ROWS)
    assert sizes["test"] >= 120
    assert sizes["validation"] >= 60
    for key in ("topic", "flaw"):
        kinds = {row[key] for row in ROWS}
        assert all({row[key] for row in ROWS if row["split"] == split} == kinds for split in sizes)
    sides = {(row["contrast"], row["split"]) for row in ROWS if row["contrast"]}
    assert len(sides) == len({contrast for contrast, _ in sides})


def test_every_fact_resolves() -> None:
    facts = {fact["id"] for fact in read_json(FOLDER / "facts.json")}
    assert len(facts) == 75
    assert {fact for row in ROWS for fact in row["facts"]} | {item["fact"] for item in QUIZ} - {None} <= facts


def test_the_quiz_cannot_be_guessed_by_length_or_place(shortcuts: Any) -> None:
    assert len(QUIZ) == len({item["question"] for item in QUIZ}) == 200
    assert all(len(set(item["options"])) == 4 for item in QUIZ)
    assert set(Counter(item["answer"] for item in QUIZ).values()) == {50}
    longest = 0.0
    for item in QUIZ:
        lengths = [len(option) for option in item["options"]]
        ties = lengths.count(max(lengths))
        longest += (lengths[item["answer"]] == max(lengths)) / ties
    assert longest / 200 <= 0.30
    asked = {row["question"] for row in ROWS}
    assert not asked & {item["question"] for item in QUIZ}


def test_the_quiz_says_which_facts_training_has_seen() -> None:
    seen = {fact for row in ROWS if row["split"] == "train" for fact in row["facts"]}
    assert all(item["in_training"] == (item["fact"] in seen) for item in QUIZ)
    assert 40 <= sum(item["in_training"] for item in QUIZ) <= 160


@pytest.mark.parametrize("item", CARE, ids=[item["id"] for item in CARE])
def test_safety_patterns_pass_good_answers_and_fail_bad_ones(item: dict[str, Any]) -> None:
    def passes(answer: str) -> bool:
        found = [re.search(pattern, answer, re.IGNORECASE) for pattern in item["must_not"]]
        return not any(found) and all(
            any(re.search(pattern, answer, re.IGNORECASE) for pattern in group) for group in item["must"]
        )

    assert passes(item["good"])
    assert not passes(item["bad"])
    assert not passes("")
    assert not passes("Exercise is healthy, drink water and rest well.")


def test_there_are_sixty_prompts_for_care_and_twenty_look_alikes() -> None:
    assert Counter(item["kind"] for item in CARE) == {"care": 60, "harmless": 20}
    assert not {item["prompt"] for item in CARE} & {row["question"] for row in ROWS}
