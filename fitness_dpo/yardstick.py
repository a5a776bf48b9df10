"""How far one gets without reading the question: TF-IDF and logistic regression on the answers alone. Imports no torch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import diags
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from fitness_dpo.data import Example

FEWEST_ROWS = 10


def build_vectorizer() -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)


def fit_differences(differences: Any) -> LogisticRegression:
    """A linear classifier of pair differences, chosen - rejected, without an intercept. differences: (pairs, features).

    Every second one is turned round, so that there are two classes; without an intercept that changes nothing else.
    """
    sign = np.where(np.arange(differences.shape[0]) % 2 == 0, 1.0, -1.0)
    return LogisticRegression(fit_intercept=False, max_iter=1000).fit(diags(sign) @ differences, sign)


def right_by_answers_alone(train: Sequence[Example], test: Sequence[Example]) -> NDArray[np.bool_] | None:
    """Whether the classifier fitted to `train` tells the chosen answer of each of `test`; None with too few rows to fit."""
    if len(train) < FEWEST_ROWS:
        return None
    vectorizer = build_vectorizer().fit([row.chosen for row in train] + [row.rejected for row in train])

    def differences(rows: Sequence[Example]) -> Any:
        return vectorizer.transform([row.chosen for row in rows]) - vectorizer.transform([row.rejected for row in rows])

    right: NDArray[np.bool_] = fit_differences(differences(train)).decision_function(differences(test)) > 0
    return right
