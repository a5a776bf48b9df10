"""conf/health: from which figure on a training is called sick."""

import dataclasses
from dataclasses import dataclass

from omegaconf import MISSING

from fitness_dpo.config.checks import one_of, require

HOPELESS = ("displacement", "over-fitting")
"""Verdicts that are given while a run trains, and that more of the same does not mend. An explosion ends every run."""


@dataclass(slots=True, kw_only=True)
class HealthConfig:
    window: int = MISSING
    """Logged steps that a training figure is averaged over; nothing is judged before twice as many are logged."""
    noise: float = MISSING
    """Standard errors that a figure must lie above zero to count as more than noise."""
    displacement: float = MISSING
    """Share of the chosen answers' log-probability under the reference that may be lost while the margin is positive."""
    length_share: float = MISSING
    """Share of the held-out margin that the answers' lengths alone may explain."""
    saturation_accuracy: float = MISSING
    """Training accuracy from which on there is nothing left to tell apart ..."""
    saturation_gradient: float = MISSING
    """... if the gradient norm has also fallen below this share of the first step's ..."""
    saturation_early: float = MISSING
    """... before this share of the planned steps."""
    overfit_accuracy: float = MISSING
    """How far training accuracy may lie above held-out accuracy while the held-out margin is below half the training margin."""
    learned_margin: float = MISSING
    """Margin, in units of reward, that the last steps must exceed."""
    explosion: float = MISSING
    """Gradient norm, as a multiple of the first step's, that ends the training when two logs in a row exceed it."""

    stop_on: list[str] = MISSING
    """Verdicts that end the training at the first log at which one is sick; what it came to by then is measured and saved."""

    def __post_init__(self) -> None:
        require(self.window >= 2, "health.window", self.window, "use 2 or more")
        for name in (field.name for field in dataclasses.fields(self) if field.type != list[str]):
            value = getattr(self, name)
            require(value > 0, f"health.{name}", value, "use more than 0")
        for name in ("length_share", "saturation_accuracy", "saturation_early", "overfit_accuracy"):
            value = getattr(self, name)
            require(value <= 1, f"health.{name}", value, "a share: use more than 0 and up to 1")
        for verdict in self.stop_on:
            one_of("health.stop_on", verdict, HOPELESS)
