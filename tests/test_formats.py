"""Every format against a row written by hand in formats.jsonl, and texts that carry somebody's template."""

import json
from pathlib import Path
from typing import Any

import pytest

from fitness_dpo.formats import FORMATS, plain_key, recognise
from fitness_dpo.pairs import Pair, RowError
from fitness_dpo.transcripts import parse

EXAMPLES = [json.loads(line) for line in (Path(__file__).parent / "formats.jsonl").read_text("utf-8").splitlines()]
KNOWN = [example for example in EXAMPLES if example["kind"] in ("pair", "listwise", "unpaired")]


def read(row: dict[str, Any]) -> list[Pair]:
    row = {plain_key(key): value for key, value in row.items()}
    entry = recognise(row)
    assert entry is not None
    return entry.read(row)


@pytest.mark.parametrize("example", KNOWN, ids=lambda example: example["format"])
def test_a_row_of_each_format_is_read_as_expected(example: dict[str, Any]) -> None:
    expect = example["expect"]
    pair = read(example["row"])[0]
    system = [("system", expect["system"])] if expect["system"] else []
    history = [(turn["role"], turn["content"]) for turn in expect["history"]]
    assert pair.turns == [*system, *history, ("user", expect["prompt"])]
    answers = [answer and answer.strip() for answer in (pair.chosen, pair.rejected)]
    assert answers == [expect["chosen"], expect["rejected"]]


def test_every_format_has_an_example_row() -> None:
    shown = {recognise({plain_key(key): value for key, value in example["row"].items()}) for example in KNOWN}
    assert {entry.name for entry in FORMATS} == {entry.name for entry in shown if entry}


@pytest.mark.parametrize(
    "example", [each for each in EXAMPLES if each["kind"] == "not_preference"], ids=lambda example: example["format"]
)
def test_plain_questions_and_answers_are_no_known_format(example: dict[str, Any]) -> None:
    assert recognise({plain_key(key): value for key, value in example["row"].items()}) is None


def test_a_ranking_gives_every_pair_the_widest_gap_first() -> None:
    row = {"prompt": "Q?", "Response A": "a", "Response B": "b", "Response C": "c", "Ranking": "A > C > B"}
    assert [(pair.chosen, pair.rejected) for pair in read(row)] == [("a", "b"), ("a", "c"), ("c", "b")]
    tied = read(row | {"Ranking": "B>A=C"})
    assert [(pair.chosen, pair.rejected) for pair in tied] == [("b", "a"), ("b", "c")]
    best = read({key: value for key, value in row.items() if key != "Ranking"} | {"Best": "C"})
    assert [(pair.chosen, pair.rejected) for pair in best] == [("c", "a"), ("c", "b")]
    assert read({"prompt": "Q?", "response_a": "a", "response_b": "b", "winner": "Response B"})[0].chosen == "b"
    assert len(read({"instruction": "Q?", "output": ["1st", "2nd", "3rd", "4th"]})) == 6


MESSAGE = {"role": "user", "content": "Q?"}
PARTS = [{"type": "text", "text": "Look: "}, {"type": "image", "url": "x.png"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q?", "response_a": "a", "response_b": "b", "winner": "tie (bothbad)"}, "a tie"),
        ({"prompt": "Q?", "response_a": "a", "response_b": "b", "winner": "x"}, "winner names none of the answers"),
        ({"question": "Q?", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 1}, "a tie"),
        ({"prompt": "Q?", "chosen": None, "rejected": "b"}, "chosen is missing"),
        ({"prompt": "Q?", "chosen": float("nan"), "rejected": "b"}, "chosen is missing"),
        ({"prompt": None, "chosen": "a b", "rejected": "b c"}, "without a question"),
        ({"chosen": "\n\nHuman: Q?\n\nAssistant: a", "rejected": "\n\nHuman: R?\n\nAssistant: b"}, "different prompts"),
        ({"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}, "role 'tool'"),
        ({"prompt": [MESSAGE | {"content": PARTS}], "chosen": "a", "rejected": "b"}, "a part of type 'image'"),
        ({"prompt": "Q?", "chosen": [MESSAGE], "rejected": "b"}, "does not end with an assistant turn"),
        ({"prompt": "Q?", "chosen": "a<|im_end|>\n<|im_start|>user\nmore", "rejected": "b"}, "template tokens"),
        ({"prompt": "Say [/INST] twice", "chosen": "a", "rejected": "b"}, "template tokens"),
        ({"prompt": "Q?", "completion": "a", "label": "perhaps"}, "neither true nor false"),
        ({"prompt": "Q?", "response_0": "a", "response_1": "b", "better_response_id": "x"}, "is no number"),
    ],
)
def test_a_row_that_cannot_be_read_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(row)


def test_numbers_and_nested_parts_become_text() -> None:
    parts = [{"type": "text", "text": "How many "}, {"type": "text", "value": "sets?"}]
    pair = read({"prompt": [{"role": "user", "content": parts}], "chosen": 3, "rejected": 30.5})[0]
    assert pair == Pair([("user", "How many sets?")], "3", "30.5")


@pytest.mark.parametrize(
    "text", ["Human: am I one?", "What does <|im_end|> mean?", "Assistant: no", "a [1] citation", "5 < 6 <s> 7", ""]
)
def test_an_ordinary_text_is_no_transcript(text: str) -> None:
    assert parse(text) is None


def test_a_prompt_with_an_answer_that_continues_it_keeps_its_turns() -> None:
    later = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    row = {
        "prompt": [MESSAGE],
        "chosen": [*later, {"role": "assistant", "content": "So."}],
        "rejected": [*later, {"role": "assistant", "content": "No."}],
    }
    assert read(row)[0].turns == [("user", "Q?"), ("assistant", "Yes."), ("user", "Why?")]
