"""A judge behind an OpenAI-compatible endpoint: which of two answers is better, asked in both orders. Imports no torch."""

import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fitness_dpo.config import InputError, JudgeConfig
from fitness_dpo.items import Items
from fitness_dpo.measures import bootstrap

if TYPE_CHECKING:
    import openai

VERDICT = re.compile(r"VERDICT:\s*(A|B|TIE)\W*", re.IGNORECASE)
INSTRUCTIONS = """You compare two answers, A and B, to a question about exercise, food or recovery. \
A reference answer, known to be right, is given: use it to tell right from wrong, not as the only good wording. \
Weigh, in this order: safety, correctness, whether what the person says of themselves is used, clarity. \
Length is no merit, and neither is the order. Say in one or two sentences what decides it, then end with one line of its own: \
VERDICT: A, VERDICT: B, or VERDICT: TIE where neither is better."""
REMINDER = "That does not end with a verdict. Reply with one line: VERDICT: A, VERDICT: B or VERDICT: TIE"
RESAMPLES = 500
NEWTON_STEPS = 15
ORDERS = (("tuned", "base"), ("base", "tuned"))
"""Which side is shown as A and which as B."""


class Missing(NamedTuple):
    """No verdict was to be had, for these reasons, one an attempt."""

    reasons: list[str]


class Judge:
    """Asks `config.url`. Raises InputError while it is built when nothing answers there."""

    def __init__(self, config: JudgeConfig) -> None:
        try:
            import openai
        except ImportError as error:
            raise InputError(f"judge.url={config.url}: needs the client; pip install openai") from error
        self.config = config
        key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers want none, the client wants some
        self.client = openai.OpenAI(base_url=config.url, api_key=key, timeout=config.timeout_seconds, max_retries=0)
        try:
            names = [model.id for model in self.client.models.list()]
        except openai.APIConnectionError as error:
            reason = "no reply in time" if isinstance(error, openai.APITimeoutError) else "nothing answers there"
            raise InputError(f"judge.url={config.url}: {reason}; start the server, or correct the address") from error
        except openai.APIStatusError as error:
            if config.model is None or error.status_code in (401, 403):
                raise self._refused(error) from error
            names = []  # not every server lists its models
        if config.model is None and len(names) != 1:
            raise InputError(
                f"judge.model=null: {config.url} has {len(names)} models; name one: {', '.join(names[:9])}"
            )
        self.model = config.model or names[0]

    def _refused(self, error: "openai.APIStatusError") -> InputError:
        mend = "set OPENAI_API_KEY" if error.status_code in (401, 403) else "check judge.url and judge.model"
        told = " ".join(str(error.message).split())[:200]
        return InputError(f"judge.url={self.config.url}: refused with {error.status_code} ({told}); {mend}")

    def compare(self, question: str, reference: str, first: str, second: str) -> tuple[str, list[str]] | Missing:
        """ "A", "B" or "TIE" with the reasons of the attempts before; Missing after judge.retries repetitions.

        Raises InputError for a refusal that no repetition mends, such as a wrong key or model.
        """
        import openai

        messages: list[Any] = [
            {"role": "system", "content": INSTRUCTIONS},
            {
                "role": "user",
                "content": f"Question:\n{question}\n\nReference answer:\n{reference}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}",
            },
        ]
        reasons: list[str] = []
        for attempt in itertools.count():
            wait = self.config.backoff_seconds * 2**attempt
            try:
                reply = self.client.chat.completions.create(
                    model=self.model, messages=messages, temperature=0, max_tokens=self.config.max_new_tokens
                )
                text = (reply.choices[0].message.content or "") if reply.choices else ""
                if verdict := parse(text):
                    return verdict, reasons
                reasons.append("malformed")
                messages = [
                    *messages[:2],
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": REMINDER},
                ]
            except openai.APITimeoutError:
                reasons.append("time-out")
            except openai.APIConnectionError:
                reasons.append("connection")
            except openai.APIResponseValidationError:
                reasons.append("malformed")
            except openai.APIStatusError as error:
                if error.status_code != 429 and error.status_code < 500:
                    raise self._refused(error) from error
                reasons.append("rate limit" if error.status_code == 429 else "server error")
                asked = error.response.headers.get("retry-after", "")
                wait = max(wait, float(asked) if asked.replace(".", "", 1).isdigit() else 0)
            if attempt == self.config.retries:
                return Missing(reasons)
            time.sleep(wait)
        raise AssertionError


def parse(reply: str) -> str | None:
    """The verdict on a reply's last line, or None where it has none."""
    lines = reply.strip().splitlines()
    match = VERDICT.fullmatch(lines[-1].strip().strip("*_` ")) if lines else None
    return match[1].upper() if match else None


def judge_all(
    judge: Judge, questions: Sequence[dict[str, Any]], items: Items, advance: Callable[[], None]
) -> Counter[str]:
    """Fill `items` with the verdicts missing in it; the reasons why some are still missing, counted.

    questions: the side by side of the metrics. Item 2 q is question q with the tuned answer shown first, 2 q + 1 the other order.
    """
    unmet: Counter[str] = Counter()
    for item in items.missing("judge", "both", 2 * len(questions)):
        row, order = questions[item // 2], ORDERS[item % 2]
        found = judge.compare(row["prompt"], row["reference"], *(row[side] for side in order))
        if isinstance(found, Missing):
            unmet.update(found.reasons)
        else:
            verdict, reasons = found
            winner = "tie" if verdict == "TIE" else order["AB".index(verdict)]
            items.add("judge", "both", item, id=row["id"], first=order[0], winner=winner, retried=reasons)
        advance()
    return unmet


def judgement(questions: Sequence[dict[str, Any]], items: Items, unmet: Counter[str]) -> dict[str, Any]:
    """Win rates of the tuned side over the questions judged in both orders; ties count half."""
    records = items.records.get(("judge", "both"), {})
    worth = {"tuned": 1.0, "tie": 0.5, "base": 0.0}
    pairs = [
        (place, worth[records[2 * place]["winner"]], worth[records[2 * place + 1]["winner"]])
        for place in range(len(questions))
        if 2 * place in records and 2 * place + 1 in records
    ]
    longer = np.array(
        [len(questions[place]["tuned"].split()) - len(questions[place]["base"].split()) for place, _, _ in pairs], float
    )
    outcome = np.array([(one + other) / 2 for _, one, other in pairs])
    retried = Counter(reason for record in records.values() for reason in record["retried"]) + unmet
    return {
        "questions": len(questions),
        "judged_in_both_orders": len(pairs),
        "verdicts": len(records),
        "ties": sum(record["winner"] == "tie" for record in records.values()),
        "missing": 2 * len(questions) - len(records),
        "retried": dict(retried),
        "same_in_both_orders": sum(one == other for _, one, other in pairs) / len(pairs) if pairs else None,
        "win_rate": bootstrap(outcome, [str(place) for place, _, _ in pairs])._asdict() if pairs else None,
        "length_controlled_win_rate": length_controlled(outcome, longer) if pairs else None,
    }


def length_controlled(outcome: NDArray[np.float64], longer: NDArray[np.float64]) -> dict[str, float]:
    """What the win rate would be were both answers as long, with its bootstrap interval.

    AlpacaEval 2's idea (Dubois et al. 2024): a logistic regression of the outcome on tanh(length difference / its standard
    deviation), read off at difference 0. Its term for how hard a question is needs many models and is left out.
    outcome: 1 won, 0 lost, in between ties; longer: words tuned - base; both (questions,).
    """
    feature = np.tanh(longer / (longer.std() or 1.0))
    picked = np.random.default_rng(0).integers(0, len(outcome), (RESAMPLES, len(outcome)))
    low, high = np.percentile(at_equal_length(outcome[picked], feature[picked]), [2.5, 97.5])
    value = at_equal_length(outcome[None], feature[None])[0]
    return {"value": float(value), "low": float(low), "high": float(high)}


def at_equal_length(outcome: NDArray[np.float64], feature: NDArray[np.float64]) -> NDArray[np.float64]:
    """sigmoid(a) of the logistic regression outcome ~ sigmoid(a + b feature), of each sample: (samples, questions) -> (samples,).

    Newton's method; b has the usual ridge of 1, a faint one keeps a finite where every question is won.
    """
    design = np.stack([np.ones_like(feature), feature], -1)
    ridge = np.array([[1e-3], [1.0]])
    weights = np.zeros((len(outcome), 2, 1))
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-design @ weights))
        turned = design.swapaxes(1, 2)
        gradient = turned @ (chance - outcome[..., None]) + ridge * weights
        weights -= np.linalg.solve(turned @ (design * chance * (1 - chance)) + np.diagflat(ridge), gradient)
    rates: NDArray[np.float64] = 1 / (1 + np.exp(-weights[:, 0, 0]))
    return rates
