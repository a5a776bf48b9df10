"""Measure what a preference set gives away without its questions.

    python scripts/check_shortcuts.py                  # the embedded set
    python scripts/check_shortcuts.py FILE [FILE ...]  # any files in its format

A set whose chosen answers can be told by length or by style alone teaches length and style. Both classifiers see
only the difference of a pair's answers, are fitted and scored by grouped 10-fold cross-validation (a contrast pair
is one group), and have no intercept, so that 0.5 is chance.
"""

import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import GroupKFold

from fitness_dpo.yardstick import build_vectorizer, fit_differences

Row = dict[str, Any]
EMBEDDED = Path(__file__).resolve().parents[1] / "data" / "fitness_qa"
LIMITS = {  # measure: (lowest, highest) allowed
    "chosen_longer": (0.45, 0.55),
    "length_accuracy": (0.0, 0.56),
    "tfidf_accuracy": (0.0, 0.75),
    "commonest_opening": (0.0, 0.03),
    "repeated_runs": (0, 0),
    "close_questions": (0, 0),
}


def load_rows(paths: list[Path]) -> list[Row]:
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]


def words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())


def groups(rows: list[Row]) -> list[str]:
    return [row["contrast"] or row["id"] for row in rows]


def pair_accuracy(chosen: Any, rejected: Any, group: list[str]) -> float:
    """Accuracy of a linear classifier on pair differences. chosen, rejected: (pairs, features)."""
    difference = chosen - rejected
    correct = []
    for train, test in GroupKFold(10, shuffle=True, random_state=0).split(difference, groups=group):
        correct.extend(fit_differences(difference[train]).decision_function(difference[test]) > 0)
    return float(np.mean(correct))


def length_features(texts: list[str]) -> np.ndarray:
    """Words, characters and sentences, their logarithms too: (texts, 6)."""
    counts = np.array([[len(words(t)), len(t), max(1, len(re.findall(r"[.!?](?:\s|$)", t)))] for t in texts], float)
    features = np.concatenate([counts, np.log(counts)], axis=1)
    scaled: np.ndarray = features / features.std(axis=0).clip(1e-9)
    return scaled


def length_accuracy(rows: list[Row]) -> float:
    features = length_features([r["chosen"] for r in rows] + [r["rejected"] for r in rows])
    return pair_accuracy(features[: len(rows)], features[len(rows) :], groups(rows))


def tfidf(rows: list[Row]) -> tuple[TfidfVectorizer, Any, Any]:
    vectorizer = build_vectorizer()
    vectorizer.fit([r["chosen"] for r in rows] + [r["rejected"] for r in rows])
    return (
        vectorizer,
        vectorizer.transform([r["chosen"] for r in rows]),
        vectorizer.transform([r["rejected"] for r in rows]),
    )


def giveaways(rows: list[Row], count: int = 15) -> tuple[list[str], list[str]]:
    """The words that speak most for chosen and for rejected."""
    vectorizer, chosen, rejected = tfidf(rows)
    order = np.argsort(fit_differences(chosen - rejected).coef_[0])
    names = vectorizer.get_feature_names_out()
    return [names[i] for i in order[::-1][:count]], [names[i] for i in order[:count]]


def commonest_opening(rows: list[Row]) -> tuple[str, float]:
    opening, count = Counter(" ".join(words(r["chosen"])[:3]) for r in rows).most_common(1)[0]
    return opening, count / len(rows)


def repeated_runs(rows: list[Row], length: int = 8) -> list[str]:
    """Runs of `length` words that stand in more than two rows outside contrast pairs."""
    seen: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        if row["contrast"] is None:
            texts = [words(row[key]) for key in ("question", "chosen", "rejected")]
            seen.update({tuple(t[i : i + length]) for t in texts for i in range(len(t) - length + 1)})
    return [" ".join(run) for run, count in seen.items() if count > 2]


def close_questions(rows: list[Row], threshold: float = 0.8) -> list[tuple[str, str]]:
    """Ids of rows whose questions' word sets overlap (Jaccard) at or past the threshold, unless a contrast pair."""
    sets = [(r, set(words(r["question"]))) for r in rows]
    return [
        (a["id"], b["id"])
        for (a, left), (b, right) in itertools.combinations(sets, 2)
        if not (a["contrast"] and a["contrast"] == b["contrast"]) and len(left & right) >= threshold * len(left | right)
    ]


def measure(rows: list[Row]) -> dict[str, float]:
    _, chosen, rejected = tfidf(rows)
    return {
        "chosen_longer": float(np.mean([len(r["chosen"]) > len(r["rejected"]) for r in rows])),
        "length_accuracy": length_accuracy(rows),
        "tfidf_accuracy": pair_accuracy(chosen, rejected, groups(rows)),
        "commonest_opening": commonest_opening(rows)[1],
        "repeated_runs": len(repeated_runs(rows)),
        "close_questions": len(close_questions(rows)),
    }


def main(paths: list[Path]) -> int:
    rows = load_rows(paths)
    measures = measure(rows)
    for name, value in measures.items():
        low, high = LIMITS[name]
        print(f"{name:18} {value:6.3f}  allowed {low}-{high}  {'ok' if low <= value <= high else 'FAILS'}")
    for_chosen, for_rejected = giveaways(rows)
    print("words for chosen:  ", ", ".join(for_chosen))
    print("words for rejected:", ", ".join(for_rejected))
    print("openings:", Counter(" ".join(words(r["chosen"])[:3]) for r in rows).most_common(3))
    print("runs:", repeated_runs(rows)[:5], " close:", close_questions(rows)[:5])
    print(
        f"rows {len(rows)}  context {sum(r['context'] for r in rows)}  contrast pairs {len({r['contrast'] for r in rows} - {None})}"
    )
    print("flaws:", dict(Counter(r["flaw"] for r in rows)))
    for row in rows:
        for side in ("chosen", "rejected"):
            if not 40 <= len(row[side].split()) <= 130:
                print(f"{row['id']}: {side} has {len(row[side].split())} words, 40-130 allowed")
    return int(any(not LIMITS[n][0] <= v <= LIMITS[n][1] for n, v in measures.items()))


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or sorted(p for p in EMBEDDED.glob("*.json") if p.stem != "facts")
    sys.exit(main(files))
