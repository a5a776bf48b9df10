"""Rows in, clean pairs out: what is kept, what is dropped under which reason, and on which side of the split it lands."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.data import Preferences, load_preferences, standardise
from tests.conftest import PAIRS

Load = Callable[..., Preferences]


@pytest.fixture
def load(compose_train: Callable[..., TrainConfig], tmp_path: Path) -> Load:
    def run(rows: object, *overrides: str) -> Preferences:
        file = tmp_path / "rows.json"
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
        return load_preferences(compose_train(f"data.path={file}", *overrides).data)

    return run


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("cafe\u0301", "café"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("  two   spaces \t here ", "two spaces here"),
        ("1 &lt; 2 &amp; 3", "1 < 2 & 3"),
        ("bell\x07 and \x00null", "bell and null"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("list:\n  - indented", "list:\n  - indented"),
        ("كم مرة أتمرن؟ 💪", "كم مرة أتمرن؟ 💪"),
    ],
)
def test_standardise(raw: str, clean: str) -> None:
    assert standardise(raw) == clean


def test_unusable_rows_are_dropped_and_counted_by_reason(load: Load) -> None:
    rows = [
        *PAIRS,
        PAIRS[0],
        {"question": "A tie?", "chosen": "same", "rejected": " same "},
        {"question": "Empty?", "chosen": "", "rejected": "b"},
        {"question": "  ", "chosen": "a", "rejected": "b"},
        {"question": "No answer", "chosen": "a"},
        {"question": "None", "chosen": None, "rejected": "b"},
        "no object",
    ]
    loaded = load(rows)
    assert loaded.read == len(rows)
    assert loaded.dropped == {
        "duplicate": 1,
        "chosen equals rejected": 1,
        "with an empty chosen answer": 1,
        "without a question": 1,
        "without the needed keys": 1,
        "chosen is missing": 1,
        "not an object": 1,
    }
    assert sum(map(len, loaded.splits.values())) == len(PAIRS)


def test_the_three_shapes_of_a_pair_give_the_same_example(load: Load) -> None:
    question, chosen, rejected = (PAIRS[0][key] for key in ("question", "chosen", "rejected"))
    said, good, bad = ([{"role": role, "content": text}] for role, text in
                       (("user", question), ("assistant", chosen), ("assistant", rejected)))  # fmt: skip
    shapes = [
        {"question": question, "chosen": chosen, "rejected": rejected},
        {"prompt": question, "chosen": chosen, "rejected": rejected},
        {"prompt": said, "chosen": good, "rejected": bad},
        {"chosen": said + good, "rejected": said + bad},
    ]
    examples = [load([shape], "data.test_size=0", "data.validation_size=0").splits["train"][0] for shape in shapes]
    assert all(example == examples[0] for example in examples)
    assert [message["role"] for message in examples[0].prompt] == ["system", "user"]
    assert (examples[0].chosen, examples[0].rejected) == (chosen, rejected)


def test_a_question_never_stands_on_two_sides(load: Load) -> None:
    rows = [pair | {"chosen": f"{pair['chosen']} Version {n}."} for pair in PAIRS for n in range(5)]
    splits = load(rows, "data.test_size=0.3", "data.validation_size=10").splits
    questions = {name: {example.question for example in examples} for name, examples in splits.items()}
    assert all(questions.values())
    assert not questions["train"] & questions["test"]
    assert not questions["validation"] & (questions["train"] | questions["test"])
    assert splits == load(rows, "data.test_size=0.3", "data.validation_size=10").splits
    assert splits != load(rows, "data.test_size=0.3", "data.validation_size=10", "data.seed=1").splits


def test_a_file_whose_own_splits_share_a_question_is_refused(load: Load) -> None:
    leak = PAIRS[0] | {"split": "test", "question": PAIRS[0]["question"].upper(), "chosen": "Other."}
    with pytest.raises(InputError, match="stands in two splits"):
        load([pair | {"split": "train"} for pair in PAIRS] + [leak])


def test_json_lines_with_a_byte_order_mark_load(load: Load) -> None:
    assert load("\ufeff" + "\n".join(map(json.dumps, PAIRS))).read == len(PAIRS)


def test_the_embedded_set_is_whole(compose_train: Callable[..., TrainConfig]) -> None:
    """660 pairs, none dropped, splits as large as the data card says."""
    whole = load_preferences(compose_train("data.ties=error", "data.duplicates=error").data)
    assert {name: len(rows) for name, rows in whole.splits.items()} == {"train": 442, "validation": 77, "test": 141}
    assert not whole.dropped
