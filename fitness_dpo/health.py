"""What a training's logged figures say about its health. Imports no torch."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fitness_dpo.config import DpoConfig, HealthConfig

Logs = Sequence[dict[str, Any]]


class Verdict(NamedTuple):
    name: str
    sick: bool
    figure: float
    threshold: float
    line: str
    """Figure, threshold and, if sick, the override to try."""


class Pairs(NamedTuple):
    """Held-out pairs, one entry each."""

    before: list[float]
    """log p(chosen) - log p(rejected) under the reference, in nats."""
    after: list[float]
    """The same under the policy."""
    length_differences: list[int]
    """Tokens of the chosen answer less those of the rejected one."""

    def rewards(self, beta: float) -> list[float]:
        """The reward margin of each pair: beta times the change."""
        return [beta * (after - before) for before, after in zip(self.before, self.after, strict=True)]


def judge(
    history: Logs, health: HealthConfig, dpo: DpoConfig, steps: int, pairs: Pairs | None = None, *, ended: bool = False
) -> list[Verdict]:
    """Every verdict that `history`, the logged steps as TRL names them, allows; `steps` are planned in all.

    Too few logs give no verdict but on explosion. No learning is judged when the training has `ended`, length exploitation
    with `pairs` only. Figures of the training batches are means over the last `health.window` logs.
    """
    train = [entry for entry in history if "loss" in entry]
    held_out = [entry for entry in history if "eval_loss" in entry and entry["step"] > 0]
    found = [explosion(train, health, dpo)]
    if len(train) >= 2 * health.window and not found[0].sick:
        latest = held_out[-1] if held_out and held_out[-1]["step"] >= train[-health.window]["step"] else None
        found.append(displacement(train, latest, health, dpo))
        found.append(saturation(train, health, dpo, steps))
        if latest is not None:
            found.append(overfitting(train, latest, health, dpo))
        if ended:
            found.append(no_learning(train, pairs, health, dpo))
    if pairs is not None and (lengths := length_exploitation(pairs, health, dpo)) is not None:
        found.append(lengths)
    return found


def explosion(train: Logs, health: HealthConfig, dpo: DpoConfig) -> Verdict:
    """NaN, or gradients that grew beyond all measure.

    A gradient that is not finite is skipped in float16 and otherwise shows in the next step's figures; a single spike is clipped.
    """
    norms = [entry["grad_norm"] for entry in train if math.isfinite(entry.get("grad_norm", math.nan))]
    broken = bool(train) and not all(math.isfinite(value) for name, value in train[-1].items() if name != "grad_norm")
    figure = math.nan if broken else min(norms[-2:]) / max(norms[0], 1e-12) if len(norms) > 1 else 1.0
    what = f"NaN at step {train[-1]['step']}" if broken else f"gradient norm {figure:.3g} times the first step's"
    return verdict(
        "explosion", broken or figure > health.explosion, figure, health.explosion, f"{what} (up to {health.explosion:g})",
        f"dpo.learning_rate={dpo.learning_rate / 10:g}, or dpo.max_grad_norm=0.1",
    )  # fmt: skip


def displacement(train: Logs, held_out: dict[str, Any] | None, health: HealthConfig, dpo: DpoConfig) -> Verdict:
    """Likelihood displacement (Razin et al. 2024): the margin grows while the chosen answers become less likely.

    Raw log-probabilities vary with the batch's rows; the chosen reward over beta is the change against the reference.
    """
    source, prefix = ([held_out], "eval_") if held_out is not None else (train[-health.window :], "")
    reward, margin, logp = (
        mean(source, prefix + name) for name in ("rewards/chosen", "rewards/margins", "logps/chosen")
    )
    change = reward / dpo.beta
    share = change / abs(logp - change)  # logp - change is the reference's
    weights = [*(dpo.loss_weights or [1.0] * len(dpo.loss_type)), 0.2]
    sft = (
        f"dpo.loss_type=[{','.join(dpo.loss_type)},sft] dpo.loss_weights=[{','.join(f'{each:g}' for each in weights)}]"
    )
    return verdict(
        "displacement", share < -health.displacement and margin > 0, share, -health.displacement,
        f"log-probability of the {'held-out ' if prefix else ''}chosen answers {share:+.1%} ({change:+.1f} nats an answer) "
        f"at a margin of {margin:.2f} (down to {-health.displacement:+.0%})",
        f"dpo.beta={2 * dpo.beta:g}" if "sft" in dpo.loss_type else f"{sft}, or dpo.beta={2 * dpo.beta:g}",
    )  # fmt: skip


def saturation(train: Logs, health: HealthConfig, dpo: DpoConfig, steps: int) -> Verdict:
    """Whether the steps go on after the pairs are told apart and nothing pulls any more."""
    norms = (entry["grad_norm"] for entry in train)  # the first ones may be infinite while float16 finds its scale
    first = next((norm for norm in norms if 0 < norm < math.inf), 1.0)
    windows = [train[end - health.window : end] for end in range(health.window, len(train) + 1)]
    share, since = 1.0, train[-1]["step"]
    for window in reversed(windows):
        gradient = statistics.median(entry["grad_norm"] for entry in window) / first
        if mean(window, "rewards/accuracies") < health.saturation_accuracy or gradient > health.saturation_gradient:
            break
        since = window[-1]["step"]
        share = since / steps
    accuracy = mean(windows[-1], "rewards/accuracies")
    gradient = statistics.median(entry["grad_norm"] for entry in windows[-1]) / first
    sick = share < health.saturation_early
    place = f" since step {since} of {steps}" if share < 1 else ""
    return verdict(
        "saturation", sick, share, health.saturation_early,
        f"training accuracy {accuracy:.2f} and gradient norm {gradient:.1%} of the first step's{place} "
        f"(accuracy up to {health.saturation_accuracy:g} or gradient down to {health.saturation_gradient:.0%} "
        f"before {health.saturation_early:.0%} of the steps)",
        f"dpo.max_steps={since}, or a lower rate: dpo.learning_rate={dpo.learning_rate / 2:g}",
    )  # fmt: skip


def overfitting(train: Logs, held_out: dict[str, Any], health: HealthConfig, dpo: DpoConfig) -> Verdict:
    """Whether the pairs are learned by heart: right on the rows seen, much less so on rows held out."""
    window = train[-health.window :]
    gap = mean(window, "rewards/accuracies") - held_out["eval_rewards/accuracies"]
    margin, held_out_margin = mean(window, "rewards/margins"), held_out["eval_rewards/margins"]
    mend = f"dpo.epochs={dpo.epochs / 2:g}" if dpo.max_steps is None else f"dpo.max_steps={max(1, dpo.max_steps // 2)}"
    return verdict(
        "over-fitting", gap > health.overfit_accuracy and held_out_margin < margin / 2, gap, health.overfit_accuracy,
        f"training accuracy {gap:+.2f} above held-out, margin {margin:.2f} against {held_out_margin:.2f} held out "
        f"(up to {health.overfit_accuracy:+.2f}, or half the margin)",
        f"{mend}, dpo.learning_rate={dpo.learning_rate / 2:g}, or more rows",
    )  # fmt: skip


def no_learning(train: Logs, pairs: Pairs | None, health: HealthConfig, dpo: DpoConfig) -> Verdict:
    """Whether the margin is no more than noise, both between the last batches and between the held-out pairs."""
    window = train[-health.window :]
    evidence = [("the last logs", [entry["rewards/margins"] for entry in window])]
    if pairs is not None and len(pairs.after) > 1:
        evidence.append(("the held-out pairs", pairs.rewards(dpo.beta)))
    measured = []
    for name, margins in evidence:
        error = statistics.stdev(margins) / math.sqrt(len(margins))
        measured.append((statistics.fmean(margins), max(health.learned_margin, health.noise * error), name))
    margin, threshold, name = max(measured, key=lambda each: each[0] / each[1])
    moved = abs(mean(window, "rewards/chosen")) > 2 * threshold
    return verdict(
        "no learning", margin <= threshold, margin, threshold,
        f"margin {margin:.3g} over {name} (at least {threshold:.2g})",
        f"dpo.learning_rate={dpo.learning_rate / 10:g}: the policy moved, but not apart" if moved
        else f"dpo.learning_rate={dpo.learning_rate * 5:g}, or more steps: dpo.epochs={dpo.epochs * 2:g}",
    )  # fmt: skip


def length_exploitation(pairs: Pairs, health: HealthConfig, dpo: DpoConfig) -> Verdict | None:
    """How much of the held-out margin lengths explain: 1 - a / mean(margin) in margin = a + b (tokens chosen - rejected).

    `a` is the margin of two answers of one length, as in length-controlled win rates (Dubois et al. 2024). Only a slope
    `b` beyond noise counts. None where it cannot be told: few pairs, or differences that do not vary.
    """
    margins = np.array(pairs.rewards(dpo.beta))
    differences = np.array(pairs.length_differences, dtype=float)
    if len(margins) < 2 * health.window or np.ptp(differences) == 0:
        return None
    spread = ((differences - differences.mean()) ** 2).sum()
    slope = float(((differences - differences.mean()) * (margins - margins.mean())).sum() / spread)
    equal = float(margins.mean() - slope * differences.mean())
    rest = margins - equal - slope * differences
    error = math.sqrt(float((rest**2).sum()) / (len(margins) - 2) / spread)
    beyond_noise = abs(slope) > health.noise * error
    share = 1 - equal / float(margins.mean()) if beyond_noise and margins.mean() > 0 else 0.0
    return verdict(
        "length exploitation", share > health.length_share, share, health.length_share,
        f"lengths explain {share:.0%} of the held-out margin of {margins.mean():.2f}; {equal:.2f} is left between answers "
        f"of one length (up to {health.length_share:.0%})",
        "pairs whose chosen answer is as often the longer one"
        + ("" if "sigmoid_norm" in dpo.loss_type else f", or dpo.loss_type=[sigmoid_norm] dpo.beta={20 * dpo.beta:g}"),
    )  # fmt: skip


def mean(entries: Logs, name: str) -> float:
    return statistics.fmean(entry[name] for entry in entries)


def verdict(name: str, sick: bool, figure: float, threshold: float, finding: str, mend: str) -> Verdict:
    return Verdict(name, sick, figure, threshold, f"{name}: {finding}" + (f"; try {mend}" if sick else ""))
