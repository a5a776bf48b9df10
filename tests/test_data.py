"""The loader: every kind of file, every mess, duplicates, splits, weights and the cache."""

import csv
import gzip
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fitness_dpo import data
from fitness_dpo.cleaning import standardise
from fitness_dpo.config import ColumnsConfig, DataConfig, InputError
from fitness_dpo.data import Preferences, load_preferences
from fitness_dpo.duplicates import near_groups, similarity

TOPICS = "legs arms sleep protein running yoga stress swimming shoulders hydration".split()  # noqa: SIM905
ROWS = [
    {"question": f"What should a beginner know about {topic}?", "chosen": f"Start slowly with {topic}.", "rejected": "Nothing."}
    for topic in TOPICS
]  # fmt: skip
REAL_WORLD = os.environ.get("FITNESS_DPO_REALWORLD")
Load = Callable[..., Preferences]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """load_preferences of `path` with the settings below and others, its cache under tmp_path."""
    monkeypatch.setenv("FITNESS_DPO_CACHE", str(tmp_path / "cache"))

    def build(path: Any, **settings: Any) -> Preferences:
        plain: dict[str, Any] = {
            "path": str(path) if isinstance(path, Path) else path,
            "columns": ColumnsConfig(prompt=None, chosen=None, rejected=None, system=None),
            "own_splits": True, "validation_size": 0.0, "test_size": 0.0, "max_rows": None,
            "max_validation_rows": None, "seed": 0, "system_prompt": None, "standardise": True,
            "ties": "drop", "duplicates": "drop", "near_duplicate": 0.8,
        }  # fmt: skip
        return load_preferences(DataConfig(**plain | settings))

    return build


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def loaded(preferences: Preferences) -> set[tuple[str, str, str]]:
    rows = [row for split in preferences.splits.values() for row in split]
    return {(row.prompt[-1]["content"], row.chosen, row.rejected) for row in rows}


EXPECTED = {(row["question"], row["chosen"], row["rejected"]) for row in ROWS}


def as_table(delimiter: str, ending: str = "\n", quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, lineterminator=ending, quoting=quoting)
    table.writeheader()
    table.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CONTENTS = {
    "json": json.dumps(ROWS).encode(),
    "json, indented": json.dumps(ROWS, indent=2).encode(),
    "json object that holds the list": json.dumps({"version": 1, "notes": [], "data": ROWS}).encode(),
    "json lines": LINES.encode(),
    "json lines with CRLF, blank lines and no last line end": LINES.replace("\n", "\r\n\r\n").rstrip().encode(),
    "byte order mark": LINES.encode("utf-8-sig"),
    "csv": as_table(","),
    "csv with semicolons, CRLF and quotes": as_table(";", "\r\n", csv.QUOTE_ALL),
    "tsv with byte order mark": b"\xef\xbb\xbf" + as_table("\t"),
    "parquet": as_parquet(),
    "gzip of json lines": gzip.compress(LINES.encode()),
    "gzip of csv": gzip.compress(as_table(",")),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_file_is_known_by_its_content(content: bytes, tmp_path: Path, load: Load) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(content)
    preferences = load(file)
    assert loaded(preferences) == EXPECTED
    assert preferences.formats == {str(file): {"question / chosen / rejected": len(ROWS)}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows.txt: the file is empty"),
        (b"[]", "holds no rows"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n", "a Git LFS pointer"),
        (b"# A readme\n\nwithout data", "line 1: not JSON, JSON lines, CSV, TSV or Parquet"),
        (b'{"prompt": "a"}\n{"prompt": \n', "rows.txt line 2: not JSON"),
        (b'[{"prompt": "a"},\n]', "rows.txt line 2: not JSON"),
        (b'{"question": "\xff"}', "is not UTF-8"),
        (b'{"question": "q", "chosen": "a", "rejected": "b"}\n{"question": "\xff"}\n', "is not UTF-8"),
        (b"PAR1 and no more", "damaged Parquet"),
        (gzip.compress(LINES.encode())[:-9], "the gzip file is damaged"),
        (b"prompt,chosen,rejected\nq,a,b,c\n", "rows.txt line 2: has more cells than columns"),
        (b"How much protein do I need to build muscle in the first year of training?,5,7\n", "its first line holds data"),
        (LINES.replace("chosen", "better").encode(), "no row of a known format (columns found: better, question, rejected)"),
        (b'[1, 2]', "no row of a known format (columns found: none)"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    content: bytes, message: str, tmp_path: Path, load: Load
) -> None:
    file = tmp_path / "rows.txt"
    file.write_bytes(content)
    with pytest.raises(InputError) as refused:
        load(file)
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


PLAIN = [
    json.loads(line)["row"]
    for line in (Path(__file__).parent / "formats.jsonl").read_text("utf-8").splitlines()
    if json.loads(line)["kind"] == "not_preference"
]


@pytest.mark.parametrize("row", PLAIN, ids=lambda row: "/".join(row))
def test_answers_without_a_rejected_one_are_refused(row: dict[str, Any], tmp_path: Path, load: Load) -> None:
    with pytest.raises(InputError, match="one answer each, none rejected") as refused:
        load(write(tmp_path / "plain.jsonl", [row] * 3))
    for column in filter(None, row):
        assert column in str(refused.value)


def test_one_plain_file_among_pairs_is_refused_by_name(tmp_path: Path, load: Load) -> None:
    pairs, plain = write(tmp_path / "pairs.jsonl", ROWS), write(tmp_path / "plain.jsonl", PLAIN[:1])
    with pytest.raises(InputError, match=r"plain\.jsonl: questions with one answer each"):
        load([str(pairs), str(plain)])


@pytest.mark.parametrize("content", ["", "[]", '{"data": []}', "prompt,chosen,rejected\n"])
def test_one_empty_file_among_pairs_is_refused_by_name(content: str, tmp_path: Path, load: Load) -> None:
    write(tmp_path / "pairs.jsonl", ROWS)
    (tmp_path / "empty.json").write_text(content)
    for path in (tmp_path, [str(tmp_path / "pairs.jsonl"), str(tmp_path / "empty.json")]):
        with pytest.raises(
            InputError, match=r"/empty\.json: (the file is empty|holds no rows|no row of a known format)"
        ):
            load(path)


def test_columns_map_any_other_file(tmp_path: Path, load: Load) -> None:
    row = {"sys": "Be kind.", "my q": "How often?", "good": "Twice a week.", "bad": "Never."}
    columns = ColumnsConfig(prompt="my q", chosen="good", rejected="bad", system="sys")
    file = write(tmp_path / "rows.jsonl", [row])
    assert load(file, columns=columns).splits["train"][0][1:4] == (
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How often?"}], "Twice a week.", "Never.",
    )  # fmt: skip
    wrong = ColumnsConfig(prompt="q", chosen="good", rejected="bad", system=None)
    with pytest.raises(InputError, match=r"the columns q, good, bad of data\.columns \(columns found: bad, good, my q"):
        load(file, columns=wrong)
    with pytest.raises(InputError, match="name all three"):
        ColumnsConfig(prompt="q", chosen=None, rejected=None, system=None)


def test_mixed_rows_are_dropped_with_reason_and_place(tmp_path: Path, load: Load) -> None:
    rows: list[Any] = [
        *ROWS,
        {"prompt": "Another key?", "chosen": 3, "rejected": 4.5, "extra": None},
        {"question": "Tie?", "chosen": "Same.", "rejected": "Same. "},
        {"question": "Empty?", "chosen": " ", "rejected": "b"},
        {"question": "", "chosen": "a", "rejected": "b"},
        {"question": "None?", "chosen": None, "rejected": "b"},
        {"title": "no such format"},
        "no object",
        ROWS[0],
        ROWS[1] | {"question": "what should a  BEGINNER know about arms ?"},
    ]
    preferences = load(write(tmp_path / "rows.jsonl", rows))
    assert {"3", "4.5"} <= {text for row in loaded(preferences) for text in row}
    assert len(loaded(preferences)) == len(ROWS) + 1
    line = f"{tmp_path}/rows.jsonl line "
    assert preferences.dropped_rows == {
        "chosen equals rejected": [line + "12"],
        "with an empty chosen answer": [line + "13"],
        "without a question": [line + "14"],
        "chosen is missing": [line + "15"],
        "without the needed keys": [line + "16"],
        "not an object": [line + "17"],
        "duplicate": [line + "18", line + "19"],
    }
    assert preferences.read == len(rows)
    with pytest.raises(InputError, match=r"rows\.jsonl line 12: 'chosen' equals 'rejected'"):
        load(tmp_path / "rows.jsonl", ties="error")
    with pytest.raises(InputError, match=r"rows\.jsonl line 18: repeats an earlier row"):
        load(tmp_path / "rows.jsonl", duplicates="error")
    assert sum(load(tmp_path / "rows.jsonl", duplicates="keep").dropped.values()) == 6


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain, untouched: 5 < 6 & 7", "plain, untouched: 5 < 6 & 7"),
        (
            "  e\u0301 \u2028 two\r\nthree\rfour\n\n\n\nfive \n six\t\tseven  ",
            "é\n two\nthree\nfour\n\nfive\n six seven",
        ),
        ("\ufeffzero\u200b width\x00\x1b", "zero width"),
        ("<p>Squat &amp; <b>press</b>:</p>\n<ul><li>slow</li>\n <li>deep</li></ul>", "Squat & press:\n- slow\n- deep"),
        ("Use the <div> tag, as in <p>text</p>, often", "Use the <div> tag, as in <p>text</p>, often"),
        ("half \ud83d a pair", "half a pair"),
        ("كم مجموعة؟ 💪🏽 👩‍🔬", "كم مجموعة؟ 💪🏽 👩‍🔬"),
        ("每周练几次？\u3000两次。", "每周练几次？\u3000两次。"),
    ],
)
def test_standardise(text: str, clean: str) -> None:
    assert standardise(text) == clean
    assert standardise(clean) == clean


def test_right_to_left_and_chinese_rows_load_and_split(tmp_path: Path, load: Load) -> None:
    rows = [
        {"question": "كم مرة في الأسبوع أتدرب؟", "chosen": "مرتان إلى ثلاث.", "rejected": "كل يوم."},
        {"question": "每周应该练几次腿？", "chosen": "两次。", "rejected": "每天。"},
        {"question": "睡眠对恢复有多重要？", "chosen": "非常重要。", "rejected": "不重要。"},
    ]
    preferences = load(write(tmp_path / "rows.jsonl", rows), test_size=1, validation_size=1)
    assert loaded(preferences) == {tuple(row.values()) for row in rows}
    assert [len(split) for split in preferences.splits.values()] == [1, 1, 1]


def test_template_tokens_are_read_as_turns_or_refused(tmp_path: Path, load: Load) -> None:
    prompt = "<|im_start|>user\nHow often?<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        {"prompt": prompt, "chosen": "Twice.<|im_end|>", "rejected": "Never.<|im_end|>"},
        {"prompt": "How long?", "chosen": "An hour.<|im_start|>user", "rejected": "A day."},
    ]
    preferences = load(write(tmp_path / "rows.jsonl", rows))
    assert loaded(preferences) == {("How often?", "Twice.", "Never.")}
    assert preferences.dropped == {"with template tokens that form no conversation": 1}


def test_unpaired_rows_are_joined_by_prompt(tmp_path: Path, load: Load) -> None:
    rows = [
        {"prompt": prompt, "completion": text, "label": label}
        for prompt, text, label in [
            ("How often?", "Twice.", True), ("How long?", "An hour.", True), ("How often?", "Never.", False),
            ("How often?", "Thrice.", True), ("How often?", "Hourly.", False), ("How often?", "Monthly.", False),
        ]
    ]  # fmt: skip
    preferences = load(write(tmp_path / "rows.jsonl", rows))
    assert loaded(preferences) == {("How often?", "Twice.", "Never."), ("How often?", "Thrice.", "Hourly.")}
    assert {place.rpartition(" ")[2] for places in preferences.dropped_rows.values() for place in places} == {"2", "6"}


def test_near_duplicates_agree_with_comparing_every_pair() -> None:
    texts = [
        f"{row['question']} {word}" for row in ROWS for word in ("", "please", "Please!", "now and for ever and ever")
    ]
    texts += ["I am 25, how heavy should I squat now?", "I am 52, how heavy should I squat now?"]
    parent = list(range(len(texts)))
    for later in range(len(texts)):
        for earlier in range(later):
            if similarity(texts[earlier], texts[later]) >= 0.8:
                old, new = parent[later], parent[earlier]
                parent = [new if group == old else group for group in parent]
    expected = [parent.index(group) for group in parent]
    assert near_groups(texts, 0.8) == expected
    assert expected[-1] == len(texts) - 1, "other numbers make another question"


def test_similarity_is_jaccard_of_words_and_neighbours() -> None:
    assert similarity("a b c", "A, b c!") == 1
    assert similarity("a b c", "a b d") == 3 / 7  # a, b, a-b of a, b, c, d, a-b, b-c, b-d
    assert similarity("run 5 km", "run 9 km") == 0


def test_thousands_of_duplicates_and_near_duplicates(tmp_path: Path, load: Load) -> None:
    near = [ROWS[0] | {"question": "So, " + ROWS[0]["question"]}] * 1000
    preferences = load(write(tmp_path / "rows.jsonl", [*ROWS * 500, *near]))
    assert loaded(preferences) == EXPECTED
    assert preferences.dropped == {"duplicate": 10 * 499 + 999, "near-duplicate": 1}


def test_other_answers_to_the_same_question_stay(tmp_path: Path, load: Load) -> None:
    rows = [
        ROWS[0] | {"chosen": answer} for answer in ("Begin with squats twice a week.", "Walk daily, then add stairs.")
    ]
    assert len(loaded(load(write(tmp_path / "rows.jsonl", rows)))) == 2


def test_rows_of_one_contrast_are_kept_and_the_embedded_set_is_whole(tmp_path: Path, load: Load) -> None:
    twins = [ROWS[0] | {"contrast": "c1"}, ROWS[0] | {"contrast": "c1", "question": ROWS[0]["question"] + " Hm"}]
    assert len(loaded(load(write(tmp_path / "rows.jsonl", twins)))) == 2
    embedded = load("fitness_qa")
    assert not embedded.dropped
    assert sum(len(rows) for rows in embedded.splits.values()) == embedded.read
    contrasts: dict[str | None, set[str]] = {}
    for name, rows in embedded.splits.items():
        for row in rows:
            contrasts.setdefault(row.contrast, set()).add(name)
    assert all(len(names) == 1 for contrast, names in contrasts.items() if contrast)


def test_like_questions_stay_on_one_side_of_a_seeded_split(tmp_path: Path, load: Load) -> None:
    rows = [row | {"question": lead + row["question"], "chosen": f"{lead}{row['chosen']} {place}."}
            for row in ROWS for place, lead in enumerate(("", "Say: ", "Well, "))]  # fmt: skip
    file = write(tmp_path / "rows.jsonl", rows)
    for seed in range(5):
        splits = load(file, test_size=0.2, validation_size=6, seed=seed).splits
        sides: dict[str, set[str]] = {}
        for name, examples in splits.items():
            for example in examples:
                topic = next(word for word in TOPICS if word in example.prompt[-1]["content"])
                sides.setdefault(topic, set()).add(name)
        assert all(len(names) == 1 for names in sides.values())
        assert [len(splits[name]) for name in ("train", "validation", "test")] == [18, 6, 6]


def test_a_split_that_no_question_is_left_for_is_an_error(tmp_path: Path, load: Load) -> None:
    rows = [ROWS[0] | {"chosen": answer} for answer in ("Begin with squats.", "Walk daily.", "Add stairs later.")]
    with pytest.raises(InputError, match="its 3 rows ask 1 unlike questions, none is left for the test split"):
        load(write(tmp_path / "rows.jsonl", rows), test_size=1)


@pytest.mark.parametrize("twist", ["{}", "{} Please", "  {}??"])
def test_a_leak_between_a_files_own_splits_is_an_error(twist: str, tmp_path: Path, load: Load) -> None:
    leak = ROWS[0] | {"question": twist.format(ROWS[0]["question"]), "chosen": "Another answer.", "split": "test"}
    file = write(tmp_path / "rows.jsonl", [*(row | {"split": "train"} for row in ROWS), leak])
    with pytest.raises(
        InputError,
        match=r"rows\.jsonl line 1 \(train\): its question stands in two splits, .*rows\.jsonl line 11 \(test\)",
    ):
        load(file)
    assert len(load(file, own_splits=False).splits["train"]) == 11


def test_weights_repeat_training_rows_only(tmp_path: Path, load: Load) -> None:
    files = [write(tmp_path / f"{name}.jsonl", ROWS[at : at + 5]) for name, at in (("one", 0), ("two", 5))]
    preferences = load({str(files[0]): 2.4, str(files[1]): 1}, test_size=2)
    uses = Counter(row.prompt[-1]["content"] for row in preferences.splits["train"])
    tested = {row.prompt[-1]["content"] for row in preferences.splits["test"]}
    assert len(preferences.splits["test"]) == len(tested) == 2
    first = [row["question"] for row in ROWS[:5] if row["question"] not in tested]
    assert sorted({uses[question] for question in first}) == [2, 3]
    assert sum(uses[question] for question in first) == len(first) * 2 + round(0.4 * len(first))
    assert {uses[row["question"]] for row in ROWS[5:] if row["question"] not in tested} == {1}
    with pytest.raises(InputError, match=r"one\.jsonl=0: use a weight of more than 0"):
        load({str(files[0]): 0})


def test_a_folder_loads_every_file_in_it(tmp_path: Path, load: Load) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS[:5])
    (folder / "b.csv.gz").write_bytes(gzip.compress(as_table(",")))
    (folder / "README.md").write_text("not data")
    assert loaded(load(folder)) == EXPECTED


def test_a_second_load_comes_from_the_cache(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0]])
    first = load(file, test_size=2)
    with monkeypatch.context() as context:
        context.setattr(data, "prepare", lambda _: pytest.fail("prepared again"))
        assert load(file, test_size=2) == first
    assert len(load(file, test_size=3).splits["test"]) == 3, "a setting changed"
    write(file, ROWS[:9])
    assert load(file, test_size=2).read == 9, "the content changed"
    written = list((tmp_path / "cache" / "data").iterdir())
    assert [cached.suffix for cached in written] == [".msgpack"] * 3, "nothing half-written stays"
    for cached in written:
        cached.write_bytes(b"\x00")
    with pytest.raises(InputError, match=r"the cached rows are damaged .* delete this file"):
        load(file, test_size=2)


DESERVED = {  # the distinct pairs of each file, counted apart from this loader; the files not named here hold none
    "dpo_en_demo.json": 295, "dpo_zh_demo.json": 289, "v1_dpo_demo.jsonl": 10, "oaast_rm_zh.json": 1798, "kto_en_demo.json": 1,
    "hh_rlhf_tiny.json": 1, "stack_exchange_paired_tiny.json": 25, "validation.jsonl": 284,
}  # fmt: skip


@pytest.mark.skipif(REAL_WORLD is None, reason="FITNESS_DPO_REALWORLD names no folder of real files")
def test_real_files_load_or_are_refused_as_their_content_deserves(load: Load) -> None:
    deserved = "one answer each, none rejected|no row of a known format|not JSON, JSON"
    for file in sorted(file for file in Path(str(REAL_WORLD)).rglob("*") if file.is_file()):
        if file.name in DESERVED:
            preferences = load(file)
            pairs = sum(len(rows) for rows in preferences.splits.values())
            assert pairs + preferences.dropped["near-duplicate"] == DESERVED[file.name], file
        else:
            with pytest.raises(InputError, match=f"{re.escape(str(file))}.*({deserved})"):
                load(file)
