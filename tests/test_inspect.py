"""inspect_data: the figures against counting by hand, the page against a browser's rules."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_verb

ROWS = [
    {"question": "How often should I train legs?", "chosen": "Twice a week.", "rejected": "Never.", "topic": "legs"},
    {
        "question": "<script>alert('x')</script> & \"co\"?",
        "chosen": "No.",
        "rejected": "Yes, of course.",
        "flaw": "vague",
    },
    {"question": "كم مرة أتدرب؟ 💪", "chosen": "مرتان في الأسبوع.", "rejected": "كل يوم.", "topic": "legs"},
    {"question": "How long is long?", "chosen": "long " * 80, "rejected": "Short.", "topic": "other"},
    {"question": "A tie?", "chosen": "Same.", "rejected": "Same."},
    {"question": "How often should I train legs?", "chosen": "Twice a week.", "rejected": "Never."},
]
SETTINGS = ["model=tiny", "model.max_length_tokens=200", "data.system_prompt=null"]
SETTINGS += ["data.validation_size=0", "data.test_size=0"]


class Tags(HTMLParser):
    """Collects the tags, their attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The report's folder and what was printed."""
    home = tmp_path_factory.mktemp("inspect")
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    done = run_verb("inspect_data", "data.path=rows.jsonl", *SETTINGS, cwd=home, FITNESS_DPO_CACHE=str(home / "cache"))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    (folder,) = (home / "outputs" / "inspect").glob("*/*")
    return folder, done.stdout


@pytest.fixture(scope="module")
def report(inspected: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((inspected[0] / "report.json").read_text("utf-8"))
    return found


def test_rows_are_counted_by_reason_with_their_lines(report: dict[str, Any]) -> None:
    assert (report["read"], report["kept"]) == (6, 4)
    assert report["dropped"] == {
        "chosen equals rejected": {"rows": 1, "places": ["rows.jsonl line 5"]},
        "duplicate": {"rows": 1, "places": ["rows.jsonl line 6"]},
    }
    assert report["duplicates"] == {"exact": 1, "near": 0}
    assert report["formats"] == {"rows.jsonl": {"question / chosen / rejected": 6}}
    assert report["splits"] == {"train": 4, "validation": 0, "test": 0}
    assert (report["topics"], report["flaws"]) == ({"legs": 2, "other": 1}, {"vague": 1})


def test_lengths_are_those_of_the_byte_level_tokenizer(report: dict[str, Any]) -> None:
    """The tiny model's tokens are bytes, and each answer ends with one token more."""
    size = {key: [len(row[key].strip().encode()) for row in ROWS[:4]] for key in ("question", "chosen", "rejected")}
    frame = len("user\n") + len("\n") + len("assistant\n") + 3  # three control tokens
    order = [[row["question"] in each["prompt"] for each in report["examples"]].index(True) for row in ROWS[:4]]
    assert sorted(order) == [0, 1, 2, 3]
    assert sorted(report["lengths"]["question"]) == sorted(bytes_ + frame for bytes_ in size["question"])
    for side in ("chosen", "rejected"):
        assert sorted(report["lengths"][side]) == sorted(bytes_ + 1 for bytes_ in size[side])
        assert report["tokens"][side]["max"] == max(size[side]) + 1
        assert report["tokens"][side]["min"] == min(size[side]) + 1
    longer = [good > bad for good, bad in zip(size["chosen"], size["rejected"], strict=True)]
    ratios = [(good + 1) / (bad + 1) for good, bad in zip(size["chosen"], size["rejected"], strict=True)]
    assert report["length_bias"] == {
        "chosen_longer": sum(longer) / 4, "mean_ratio": pytest.approx(sum(ratios) / 4, abs=1e-3)
    }  # fmt: skip
    assert report["too_long"] == {"rows": 1, "places": ["rows.jsonl line 4"]}


def test_examples_are_what_the_model_sees(report: dict[str, Any]) -> None:
    first = next(each for each in report["examples"] if each["place"] == "rows.jsonl line 1")
    assert first == {
        "place": "rows.jsonl line 1",
        "prompt": "<|im_start|>user\nHow often should I train legs?<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "Twice a week.<|im_end|>",
        "rejected": "Never.<|im_end|>",
    }


def test_the_page_is_escaped_and_needs_nothing_from_outside(inspected: tuple[Path, str]) -> None:
    page = (inspected[0] / "report.html").read_text("utf-8")
    found = Tags(page)
    assert "script" not in found.tags
    assert "alert('x')" in found.text
    assert found.tags.count("svg") == 2
    assert {"img", "link", "iframe"}.isdisjoint(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", page.split("<h2>As the model")[0])
    assert ("name", "viewport") in found.attributes
    assert "كم مرة أتدرب؟" in found.text


def test_the_screen_says_what_matters(inspected: tuple[Path, str]) -> None:
    printed = " ".join(inspected[1].split())
    for part in (
        "6 read, 4 pairs kept: 4 train, 0 validation, 0 test",
        "question / chosen / rejected: 6 rows of rows.jsonl",
        "1 chosen equals rejected: line 5",
        "1 duplicate: line 6",
        "1 rows of more than 200 tokens",
        "chosen longer in 75% of the pairs",
        f"outputs/inspect/{'/'.join(inspected[0].parts[-2:])}/report.html",
    ):
        assert part in printed


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path=nowhere.json", "data.path=nowhere.json: no such file"),
        ("data.colums.prompt=q", "did you mean data.columns.prompt?"),
        ("data.columns.prompt=q", "name all three of prompt, chosen and rejected"),
        ("data.near_duplicate=0", "data.near_duplicate=0.0: use more than 0 and up to 1"),
        ("data.path={a.json: -1}", "data.path.a.json=-1: use a weight of more than 0"),
    ],
)
def test_a_mistake_ends_in_one_line(override: str, expected: str, tmp_path: Path) -> None:
    done = run_verb("inspect_data", *SETTINGS, override, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert not list(tmp_path.rglob("report*"))


def test_columns_and_weights_come_in_on_the_command_line(compose_train: Callable[..., Any]) -> None:
    data = compose_train(
        "data.columns={prompt: q, chosen: good, rejected: bad}", "data.path={a.json: 2, b.csv: 0.5}"
    ).data
    assert data.columns.named() == {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert data.weights == {"a.json": 2, "b.csv": 0.5}
    assert compose_train("data.path=[a.json,org/name]").data.weights == {"a.json": 1, "org/name": 1}
