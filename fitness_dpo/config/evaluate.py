"""conf/evaluate.yaml: what is measured, what the gate refuses and who judges."""

from dataclasses import dataclass

from omegaconf import MISSING

from fitness_dpo.config.checks import one_of, require
from fitness_dpo.config.data import DataConfig
from fitness_dpo.config.model import ModelOverrides


@dataclass(slots=True, kw_only=True)
class GateConfig:
    """What a tuned model must keep or reach. Without these breaches the verdict is not `unsafe` and may be `better`."""

    enabled: bool = MISSING
    """End with exit status 3 and one line for each breach."""
    min_accuracy: float = MISSING
    """Reward accuracy on the held-out pairs must be above this."""
    quiz_p_value: float = MISSING
    """A lower quiz score is a loss where McNemar's p-value is below this; above it, it is noise."""
    min_care_passed: float = MISSING
    """Share of the prompts that need care which must be met with it, whatever the base does."""
    max_care_loss: float = MISSING
    """How much smaller than the base's that share may be."""
    max_over_refusal_rise: float = MISSING
    """How much larger than the base's the share of harmless look-alikes that are refused may be."""
    max_degeneration: float = MISSING
    """How much worse than the base's each measure of degeneration, a share, may be beyond noise (its 95% interval)."""
    max_length_change: float = MISSING
    """How far the mean number of words may lie from the base's, as a share of it."""

    def __post_init__(self) -> None:
        for key in ("min_accuracy", "quiz_p_value", "min_care_passed", "max_care_loss", "max_over_refusal_rise"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"gate.{key}", value, "use 0 up to 1")
        for key in ("max_degeneration", "max_length_change"):
            value = getattr(self, key)
            require(value >= 0, f"gate.{key}", value, "use 0 or more")


@dataclass(slots=True, kw_only=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that compares the two answers to each question."""

    url: str | None = MISSING
    """The endpoint, such as http://localhost:8000/v1; null asks no judge. Its key is read from OPENAI_API_KEY."""
    model: str | None = MISSING
    """The judge's name at the endpoint; null takes the only model it lists."""
    timeout_seconds: float = MISSING
    """A reply that takes longer is asked for again."""
    retries: int = MISSING
    """Ask again this often after a time-out, a rate limit, a server error or a malformed verdict; then the verdict is missing."""
    backoff_seconds: float = MISSING
    """Wait before the first repetition, doubled at each further one; a longer Retry-After is kept to."""
    max_new_tokens: int = MISSING

    def __post_init__(self) -> None:
        require(
            self.url is None or self.url.startswith(("http://", "https://")),
            "judge.url", self.url, "give the endpoint whole, such as http://localhost:8000/v1",
        )  # fmt: skip
        require(self.timeout_seconds > 0, "judge.timeout_seconds", self.timeout_seconds, "use more than 0")
        require(self.retries >= 0, "judge.retries", self.retries, "use 0 or more")
        require(self.backoff_seconds >= 0, "judge.backoff_seconds", self.backoff_seconds, "use 0 or more")
        require(self.max_new_tokens >= 1, "judge.max_new_tokens", self.max_new_tokens, "use 1 or more")


@dataclass(slots=True, kw_only=True)
class EvaluateConfig:
    run: str = MISSING
    """`latest` or a run folder, whose adapter is compared with its base."""
    against: str | None = MISSING
    """Another run on the same base, which takes the base's place in every comparison; null compares with the base."""
    model: ModelOverrides = MISSING
    data: DataConfig = MISSING
    """The rows for a model without a run; a run is measured on its own."""
    split: str = MISSING
    """`test`, or `validation` while settings are still being chosen."""
    quiz: str = MISSING
    """`fitness_eval`, the embedded questions, or a JSON file in their format (docs/evaluation.md)."""
    safety: str = MISSING
    """The same for the safety prompts."""
    questions: int = MISSING
    """Held-out questions answered side by side, and judged where a judge is named."""
    limit: int | None = MISSING
    """Take no more than this many pairs, quiz questions, safety prompts and questions each, for a quick look."""
    max_new_tokens: int = MISSING
    """The longest answer; one that reaches it counts as not ended."""
    batch_size: int = MISSING
    """Answers computed at once. It changes speed and memory, and in float32 nothing else."""
    gate: GateConfig = MISSING
    judge: JudgeConfig = MISSING

    def __post_init__(self) -> None:
        one_of("split", self.split, ("test", "validation"))
        require(self.questions >= 1, "questions", self.questions, "use 1 or more")
        for key in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "use 1 or more")
