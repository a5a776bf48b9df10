"""conf/model: which model, in which precision; conf/lora: the adapter that is trained on it."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from fitness_dpo.config.checks import one_of, require

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    name: str = MISSING
    """A hub id, a local folder, or `embedded:smollm2-135m-instruct`."""
    revision: str | None = MISSING
    """Branch, tag or commit on the hub; null for its main branch."""
    backend: str = MISSING
    """What builds the model for training: `unsloth`, or stock `transformers` with PEFT. Answering always uses the latter."""
    max_length_tokens: int = MISSING
    """Longest prompt plus answer, in tokens. Longer training rows are dropped and counted."""
    load_in_4bit: bool = MISSING
    """Quantize the frozen weights to NF4 (QLoRA, Dettmers et al. 2023)."""
    dtype: str = MISSING
    """`auto` is bfloat16 where the chip has it, else float16 on a GPU and float32 on a CPU."""
    gradient_checkpointing: str = MISSING
    """`unsloth`, `true` or `false`: recompute activations in the backward pass to save memory."""
    trust_remote_code: bool = MISSING
    """Let a hub repository run its own Python code here."""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name", repr(self.name), "name a hub id or a local folder")
        one_of("model.backend", self.backend, ("unsloth", "transformers"))
        one_of("model.dtype", self.dtype, DTYPES)
        self.gradient_checkpointing = self.gradient_checkpointing.lower()  # Hydra reads a bare true as a truth value
        one_of("model.gradient_checkpointing", self.gradient_checkpointing, ("unsloth", "true", "false"))
        require(self.max_length_tokens >= 16, "model.max_length_tokens", self.max_length_tokens, "use 16 or more")
        require(
            not (self.gradient_checkpointing == "unsloth" and self.backend == "transformers"),
            "model.gradient_checkpointing", "unsloth", "use true or false with model.backend=transformers",
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021): W + (alpha / r) B A, with A and B trained."""

    r: int = MISSING
    """Rank of the update."""
    alpha: int = MISSING
    """The update is scaled by alpha / r (by alpha / sqrt(r) with rsLoRA)."""
    dropout: float = MISSING
    target_modules: Any = MISSING
    """Names of the linear layers to adapt, or `all-linear`."""
    bias: str = MISSING
    use_rslora: bool = MISSING
    """Scale by alpha / sqrt(r), which keeps learning stable at large r (Kalajdzievski 2023)."""
    use_dora: bool = MISSING
    """Learn magnitude and direction apart (DoRA, Liu et al. 2024)."""
    init: str = MISSING
    """`default` (B = 0), `gaussian`, `pissa`, `olora` or `orthogonal`."""
    modules_to_save: list[str] | None = MISSING
    """Layers trained in full and saved with the adapter; null for none."""

    def __post_init__(self) -> None:
        require(self.r >= 1, "lora.r", self.r, "use 1 or more")
        require(self.alpha >= 1, "lora.alpha", self.alpha, "use 1 or more")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "use 0 or more and below 1")
        names = self.target_modules
        require(
            names == "all-linear" or (isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)),
            "lora.target_modules", names, "name at least one linear layer, such as [q_proj,v_proj], or all-linear",
        )  # fmt: skip
        require(
            "lm_head" not in {name.rpartition(".")[2] for name in names},
            "lora.target_modules",
            names,
            "leave lm_head out: TRL's loss reads its weight directly",
        )
        require(
            "embed_tokens" not in {name.rpartition(".")[2] for name in names},
            "lora.target_modules",
            names,
            "leave embed_tokens out: where the head shares its weight, merging would change the head too",
        )
        one_of("lora.bias", self.bias, ("none", "all", "lora_only"))
        one_of("lora.init", self.init, ("default", "gaussian", "pissa", "olora", "orthogonal"))


@dataclass(slots=True, kw_only=True)
class ModelOverrides:
    """The run's own model settings, where null."""

    name: str | None = MISSING
    """Answer with this model itself, without a run's adapter."""
    revision: str | None = MISSING
    max_length_tokens: int | None = MISSING
    load_in_4bit: bool | None = MISSING
    dtype: str | None = MISSING
    trust_remote_code: bool | None = MISSING

    def __post_init__(self) -> None:
        length = self.max_length_tokens
        require(length is None or length >= 16, "model.max_length_tokens", length, "use 16 or more")
        if self.dtype is not None:
            one_of("model.dtype", self.dtype, DTYPES)
