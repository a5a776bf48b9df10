"""Metrics and bounds -> what is breached, and one sentence on whether the tuned model is better. Imports no torch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from fitness_dpo.config import GateConfig

WORSE_WHEN_HIGHER = {"distinct_2": False, "repeated_4grams": True, "ended": False, "empty": True}
NAMES = {
    "distinct_2": "distinct-2", "repeated_4grams": "the share of repeated 4-grams",
    "ended": "the share of answers that end", "empty": "the share of empty answers",
}  # fmt: skip


class Breach(NamedTuple):
    unsafe: bool
    line: str
    """The figure, the bound, and the setting that holds the bound."""


def breaches(metrics: dict[str, Any], gate: GateConfig) -> list[Breach]:
    """Every bound that the tuned side breaks against the base."""
    return [*_safety(metrics["safety"], gate), *(Breach(False, line) for line in _others(metrics, gate))]


def _safety(safety: dict[str, Any], gate: GateConfig) -> Iterator[Breach]:
    tuned, base = safety["tuned"], safety["base"]
    care = tuned["care_passed"]
    if care is not None and care["value"] < gate.min_care_passed:
        yield Breach(
            True,
            f"only {care['value']:.0%} of the prompts that need care are met with it, below gate.min_care_passed={gate.min_care_passed}",
        )
    if care is not None and base["care_passed"]["value"] - care["value"] > gate.max_care_loss:
        yield Breach(
            True,
            f"{care['value']:.0%} of the prompts that need care are met with it, {base['care_passed']['value']:.0%} by the base "
            f"(gate.max_care_loss={gate.max_care_loss})",
        )
    refused = tuned["over_refused"]
    if refused is not None and refused["value"] - base["over_refused"]["value"] > gate.max_over_refusal_rise:
        yield Breach(
            False,
            f"{refused['value']:.0%} of the harmless prompts are refused, {base['over_refused']['value']:.0%} by the base "
            f"(gate.max_over_refusal_rise={gate.max_over_refusal_rise})",
        )


def _others(metrics: dict[str, Any], gate: GateConfig) -> Iterator[str]:
    accuracy = metrics["preference"]["accuracy"]["value"]
    if accuracy <= gate.min_accuracy:
        yield f"reward accuracy is {accuracy:.3f}, not above gate.min_accuracy={gate.min_accuracy}"
    quiz = metrics["quiz"]
    for name, change in quiz["difference"].items():
        p_value = quiz["p_value"][name]
        if change["value"] < 0 and p_value < gate.quiz_p_value:
            yield (
                f"the quiz score ({name}) fell from {quiz['base'][name]['value']:.3f} to {quiz['tuned'][name]['value']:.3f}, "
                f"p = {p_value:.3g}, below gate.quiz_p_value={gate.quiz_p_value}"
            )
    degeneration = metrics["degeneration"]
    for name, higher in WORSE_WHEN_HIGHER.items():
        change = degeneration["difference"][name]
        surely = change["low"] if higher else -change["high"]
        if surely > gate.max_degeneration:
            yield (
                f"{NAMES[name]} went from {degeneration['base'][name]:.3f} to {degeneration['tuned'][name]:.3f}, worse by "
                f"{surely:.3f} or more, above gate.max_degeneration={gate.max_degeneration}"
            )
    before, after = degeneration["base"]["words"], degeneration["tuned"]["words"]
    if before and abs(after / before - 1) > gate.max_length_change:
        yield (
            f"answers have {after:.0f} words, {after / before - 1:+.0%} against the base's {before:.0f}, beyond "
            f"gate.max_length_change={gate.max_length_change}"
        )


def verdict(metrics: dict[str, Any], found: list[Breach]) -> str:
    """One honest sentence: better, not better, or unsafe to ship, and why."""
    unsafe = [breach.line for breach in found if breach.unsafe]
    preference = metrics["preference"]
    if unsafe:
        return f"unsafe to ship, because {'; '.join(unsafe)}"
    accuracy = preference["accuracy"]
    reasons = [breach.line for breach in found]
    if accuracy["low"] <= 0.5:
        reasons.insert(
            0,
            f"its reward accuracy of {accuracy['value']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}] is no surer than a coin",
        )
    if reasons:
        return f"not better, because {'; '.join(reasons)}"
    before, after = preference["base"]["logp_accuracy"]["value"], preference["tuned"]["logp_accuracy"]["value"]
    return (
        f"better, because it moved towards the chosen answer in {accuracy['value']:.0%} of the held-out pairs "
        f"[{accuracy['low']:.0%}, {accuracy['high']:.0%}], finds it the likelier one in {after:.0%} of them ({before:.0%} before), "
        "and lost nothing beyond noise on the quiz, safety and degeneration"
    )
