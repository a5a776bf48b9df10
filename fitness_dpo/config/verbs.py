"""What each verb takes: the roots conf/config.yaml, conf/infer.yaml and their like."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from fitness_dpo.config.answering import ChatConfig, InferConfig, ServeConfig
from fitness_dpo.config.checks import require
from fitness_dpo.config.data import DataConfig
from fitness_dpo.config.dpo import DpoConfig
from fitness_dpo.config.evaluate import EvaluateConfig
from fitness_dpo.config.export import ExportConfig
from fitness_dpo.config.health import HealthConfig
from fitness_dpo.config.logging import LoggingConfig
from fitness_dpo.config.model import LoraConfig, ModelConfig
from fitness_dpo.config.sweep import SweepConfig


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    lora: LoraConfig = MISSING
    dpo: DpoConfig = MISSING
    health: HealthConfig = MISSING
    logging: LoggingConfig = MISSING
    sweep: SweepConfig = MISSING
    resume: str | None = MISSING
    """`latest` or the folder of an interrupted run to go on with; null starts a new one."""
    allow_changes: list[str] = MISSING
    """Settings that a resumed run may change, such as [dpo.save_steps]. A change to any other is refused."""
    max_minutes: float | None = MISSING
    """Save a checkpoint and leave after this long; null trains to the end."""

    def __post_init__(self) -> None:
        minutes = self.max_minutes
        require(minutes is None or minutes > 0, "max_minutes", minutes, "use more than 0, or null for no limit")
        require(
            not (self.model.load_in_4bit and self.lora.init in ("pissa", "olora")),
            "lora.init", self.lora.init, "needs 16-bit weights to split; set model.load_in_4bit=false",
        )  # fmt: skip
        require(
            not (self.lora.use_dora and self.lora.init in ("pissa", "olora")),
            "lora.init", self.lora.init, "cannot be saved with lora.use_dora=true; set lora.init=default",
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class InspectConfig:
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    """Its tokenizer counts the tokens and renders the examples; no weights are loaded."""


@dataclass(slots=True, kw_only=True)
class LeaderboardConfig:
    sweep: str = MISSING
    """`latest` or a sweep's folder."""


@dataclass(slots=True, kw_only=True)
class ReportConfig:
    run: str = MISSING
    """`latest` or a run folder."""


def register() -> None:
    """Make the shapes known to Hydra, under the names the root YAML files build on."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="infer_schema", node=InferConfig)
    store.store(name="chat_schema", node=ChatConfig)
    store.store(name="serve_schema", node=ServeConfig)
    store.store(name="inspect_schema", node=InspectConfig)
    store.store(name="report_schema", node=ReportConfig)
    store.store(name="leaderboard_schema", node=LeaderboardConfig)
    store.store(name="export_schema", node=ExportConfig)
