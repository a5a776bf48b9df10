"""What a sweep of several runs (`-m`) does with them; the values are in conf/config.yaml."""

from dataclasses import dataclass

from omegaconf import MISSING

from fitness_dpo.config.checks import require


@dataclass(slots=True, kw_only=True)
class SweepConfig:
    resume: str | None = MISSING
    """`latest` or the folder of a sweep to finish: the same command, and only what is missing is run; null starts a new one."""
    at_once: int | None = MISSING
    """Runs at the same time; null is one for each GPU, and one where there is none."""
    seeds: int = MISSING
    """Train each setting with so many values of dpo.seed, from dpo.seed on, and rank the means."""

    def __post_init__(self) -> None:
        require(self.at_once is None or self.at_once >= 1, "sweep.at_once", self.at_once, "use 1 or more")
        require(self.seeds >= 1, "sweep.seeds", self.seeds, "use 1 or more")
