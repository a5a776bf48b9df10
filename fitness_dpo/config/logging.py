"""conf/logging: what a run records and shows; conf/sampling: how its answers are drawn."""

from dataclasses import dataclass

from omegaconf import MISSING

from fitness_dpo.config.checks import one_of, require


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    mode: str = MISSING
    """`auto` is online where a key is set and offline where none is; `online`, `offline`, `disabled`."""
    project: str = MISSING
    group: str | None = MISSING
    name: str | None = MISSING
    """Null takes the run folder's name."""
    tags: list[str] = MISSING

    def __post_init__(self) -> None:
        one_of("logging.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """How an answer is drawn."""

    do_sample: bool = MISSING
    """False takes the likeliest token each time (greedy); true draws with the next two."""
    temperature: float = MISSING
    top_p: float = MISSING
    max_new_tokens: int = MISSING
    seed: int = MISSING
    """Decides what is drawn when `do_sample` is true."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "sampling.temperature", self.temperature, "use more than 0")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "use more than 0 and up to 1")
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "use 1 or more")


@dataclass(slots=True, kw_only=True)
class LoggingConfig:
    wandb: WandbConfig = MISSING
    tensorboard: bool = MISSING
    """Also write TensorBoard event files into the run folder."""
    console: bool = MISSING
    """Print progress, samples and the closing screen."""
    sample_prompts: list[str] = MISSING
    """Questions answered before, during and after training."""
    sample_steps: int | None = MISSING
    """Answer them every so many steps; null for before and after only."""
    sampling: SamplingConfig = MISSING

    def __post_init__(self) -> None:
        require(
            self.sample_steps is None or self.sample_steps >= 1,
            "logging.sample_steps",
            self.sample_steps,
            "use 1 or more",
        )
