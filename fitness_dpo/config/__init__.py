"""The shape, units and checks of every setting, a module a group of conf/. The values live in conf/, nowhere else.
Imports no torch."""

from fitness_dpo.config.answering import BotConfig, ChatConfig, InferConfig, ServeConfig
from fitness_dpo.config.checks import Fault, Hopeless, InputError
from fitness_dpo.config.data import ColumnsConfig, DataConfig
from fitness_dpo.config.dpo import DpoConfig
from fitness_dpo.config.evaluate import EvaluateConfig, GateConfig, JudgeConfig
from fitness_dpo.config.export import ExportConfig, HubConfig, ParityConfig
from fitness_dpo.config.health import HealthConfig
from fitness_dpo.config.logging import LoggingConfig, SamplingConfig, WandbConfig
from fitness_dpo.config.model import LoraConfig, ModelConfig, ModelOverrides
from fitness_dpo.config.sweep import SweepConfig
from fitness_dpo.config.verbs import InspectConfig, LeaderboardConfig, ReportConfig, TrainConfig, register

__all__ = [
    "BotConfig", "ChatConfig", "ColumnsConfig", "DataConfig", "DpoConfig", "EvaluateConfig", "ExportConfig", "Fault", "GateConfig",
    "HealthConfig", "Hopeless", "HubConfig", "InferConfig", "InputError", "InspectConfig", "JudgeConfig", "LeaderboardConfig", "LoggingConfig",
    "LoraConfig", "ModelConfig", "ModelOverrides", "ParityConfig", "ReportConfig", "SamplingConfig", "ServeConfig", "SweepConfig",
    "TrainConfig", "WandbConfig", "register",
]  # fmt: skip
