"""What the verbs that answer take: infer, chat and serve. conf/answering.yaml holds the defaults they share."""

from dataclasses import dataclass

from omegaconf import MISSING

from fitness_dpo.config.checks import require
from fitness_dpo.config.logging import SamplingConfig
from fitness_dpo.config.model import ModelOverrides


@dataclass(slots=True, kw_only=True)
class BotConfig:
    """Which model answers, and how."""

    run: str = MISSING
    """`latest` or a run folder."""
    system_prompt: str | None = MISSING
    """Replaces the run's system prompt; null keeps it."""
    model: ModelOverrides = MISSING
    sampling: SamplingConfig = MISSING


@dataclass(slots=True, kw_only=True)
class InferConfig(BotConfig):
    prompt: str | None = MISSING
    """The question; null opens a conversation in a terminal."""
    input: str | None = MISSING
    """A file of questions to answer: JSON, JSON lines, CSV, TSV or Parquet with a column `question` or `prompt`, or plain
    text with one on each line."""
    output: str | None = MISSING
    """Where their answers go, as JSON lines. What stands there already is not answered again."""
    batch_size: int = MISSING
    """Questions of `input` answered at once."""

    def __post_init__(self) -> None:
        require((self.input is None) == (self.output is None), "input", self.input, "give input and output together")
        require(self.prompt is None or self.input is None, "input", self.input, "give prompt or input, not both")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "use 1 or more")


@dataclass(slots=True, kw_only=True)
class ServerConfig(BotConfig):
    host: str = MISSING
    """The address to listen at; 127.0.0.1 is this machine alone."""
    port: int = MISSING

    def __post_init__(self) -> None:
        require(0 < self.port < 65536, "port", self.port, "use 1 to 65535")


@dataclass(slots=True, kw_only=True)
class ChatConfig(ServerConfig):
    examples: dict[str, list[str]] = MISSING
    """Example questions by topic, one click each."""


@dataclass(slots=True, kw_only=True)
class ServeConfig(ServerConfig):
    name: str = MISSING
    """What clients call the model."""
