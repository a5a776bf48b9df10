"""The shape, units and checks of every setting. The values live in conf/, nowhere else. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

LOSS_TYPES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip
SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")
SCHEDULERS = (
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "cosine_with_restarts",
    "inverse_sqrt",
)
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd")
DTYPES = ("auto", "bfloat16", "float16", "float32")


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: the key or file, the value, the mend."""


def _require(holds: bool, key: str, value: object, mend: str) -> None:
    if not holds:
        raise InputError(f"{key}={value}: {mend}")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, value, f"choose one of {', '.join(choices)}")


@dataclass(slots=True, kw_only=True)
class ColumnsConfig:
    """Names of the columns of a file whose format is none of docs/formats.md; all null recognises the format."""

    prompt: str | None = MISSING
    chosen: str | None = MISSING
    rejected: str | None = MISSING
    system: str | None = MISSING

    def __post_init__(self) -> None:
        named = [name for name in (self.prompt, self.chosen, self.rejected) if name is not None]
        _require(
            len(named) == 3 or (not named and self.system is None),
            "data.columns", self.named(), "name all three of prompt, chosen and rejected (system may be left out)",
        )  # fmt: skip

    def named(self) -> dict[str, str]:
        """Our name -> the file's name, for those that are given."""
        keys = ("prompt", "chosen", "rejected", "system")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


@dataclass(slots=True, kw_only=True)
class DataConfig:
    path: Any = MISSING
    """A file (JSON, JSONL, CSV, TSV, Parquet, each plain or .gz), a folder of them, a hub dataset id, a list of these, or
    a mapping from these to weights: how often each training row is used, such as 2 or 0.5. `fitness_qa` is the embedded set."""
    columns: ColumnsConfig = MISSING
    own_splits: bool = MISSING
    """Keep rows in the `split` they name; false sorts them by `seed` like rows that name none."""
    validation_size: float = MISSING
    """Share of the questions (below 1) or number of rows (1 and above) held out to watch training, where rows name no split."""
    test_size: float = MISSING
    """The same for rows that training never sees."""
    max_rows: int | None = MISSING
    """Keep at most this many training rows, drawn by `seed`; null keeps all."""
    max_validation_rows: int | None = MISSING
    """Keep at most this many validation rows, drawn by `seed`; null keeps all."""
    seed: int = MISSING
    """Decides the split and the rows that `max_rows` keeps."""
    system_prompt: str | None = MISSING
    """Stands before every question that brings no system message of its own; null for none."""
    standardise: bool = MISSING
    """Normalise Unicode to NFC, line ends, white space and HTML entities, and remove control characters."""
    ties: str = MISSING
    """A row whose chosen answer equals the rejected one: `drop` it (counted) or make it an `error`."""
    duplicates: str = MISSING
    """A row seen before, or nearly so: `drop` it (counted), `keep` it, or make it an `error`."""
    near_duplicate: float = MISSING
    """From this similarity on two texts count as the same: the share of words and neighbouring words they have in common
    (Jaccard), more than 0 and up to 1. Such questions never stand on two sides of a split."""

    def __post_init__(self) -> None:
        paths = list(self.path) if isinstance(self.path, (list, dict)) else [self.path]
        _require(
            bool(paths) and all(isinstance(path, str) and path for path in paths),
            "data.path", self.path, "name a file, a folder, a hub dataset, a list of these, or a mapping to weights",
        )  # fmt: skip
        for path, weight in self.weights.items():
            _require(
                isinstance(weight, (int, float)) and not isinstance(weight, bool) and weight > 0,
                f"data.path.{path}", weight, "use a weight of more than 0, such as 2 or 0.5",
            )  # fmt: skip
        for key, size in (("validation_size", self.validation_size), ("test_size", self.test_size)):
            _require(size >= 0, f"data.{key}", size, "use a share below 1 or a number of rows")
            _require(
                size < 1 or size == int(size), f"data.{key}", size, "use a share below 1 or a whole number of rows"
            )
        shares = [size for size in (self.validation_size, self.test_size) if size < 1]
        _require(sum(shares) < 1, "data.validation_size + data.test_size", sum(shares), "leave rows to train on")
        for key, rows in (("max_rows", self.max_rows), ("max_validation_rows", self.max_validation_rows)):
            _require(rows is None or rows >= 1, f"data.{key}", rows, "use 1 or more, or null for all")
        _one_of("data.ties", self.ties, ("drop", "error"))
        _one_of("data.duplicates", self.duplicates, ("drop", "keep", "error"))
        _require(
            0 < self.near_duplicate <= 1, "data.near_duplicate", self.near_duplicate, "use more than 0 and up to 1"
        )

    @property
    def weights(self) -> dict[str, float]:
        """How often each training row of each path is used."""
        if isinstance(self.path, dict):
            return self.path
        return dict.fromkeys([self.path] if isinstance(self.path, str) else self.path, 1)


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
        _require(bool(self.name), "model.name", repr(self.name), "name a hub id or a local folder")
        _one_of("model.backend", self.backend, ("unsloth", "transformers"))
        _one_of("model.dtype", self.dtype, DTYPES)
        _one_of("model.gradient_checkpointing", self.gradient_checkpointing, ("unsloth", "true", "false"))
        _require(self.max_length_tokens >= 16, "model.max_length_tokens", self.max_length_tokens, "use 16 or more")
        _require(
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
        _require(self.r >= 1, "lora.r", self.r, "use 1 or more")
        _require(self.alpha >= 1, "lora.alpha", self.alpha, "use 1 or more")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "use 0 or more and below 1")
        names = self.target_modules
        _require(
            names == "all-linear" or (isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)),
            "lora.target_modules", names, "name at least one linear layer, such as [q_proj,v_proj], or all-linear",
        )  # fmt: skip
        _require(
            "lm_head" not in names,
            "lora.target_modules",
            names,
            "leave lm_head out: TRL's loss reads its weight directly",
        )
        _one_of("lora.bias", self.bias, ("none", "all", "lora_only"))
        _one_of("lora.init", self.init, ("default", "gaussian", "pissa", "olora", "orthogonal"))


@dataclass(slots=True, kw_only=True)
class DpoConfig:
    """Direct Preference Optimization (Rafailov et al. 2023, eq. 7): the loss is
    -log sigmoid(beta * ((logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)))."""

    beta: float = MISSING
    """Strength of the tie to the reference: higher stays closer."""
    loss_type: list[str] = MISSING
    """One or several of TRL's losses."""
    loss_weights: list[float] | None = MISSING
    """One weight for each loss; null weighs them all 1."""
    label_smoothing: float = MISSING
    """Share of labels taken to be flipped; only robust, exo_pair, aot and aot_unpaired use it."""
    precompute_reference: bool = MISSING
    """Compute the reference's log-probabilities once before training instead of at every step."""
    learning_rate: float = MISSING
    lr_scheduler: str = MISSING
    warmup_ratio: float = MISSING
    """Share of the steps over which the learning rate rises from 0."""
    optimizer: str = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    batch_size: int = MISSING
    """Pairs in one forward pass."""
    gradient_accumulation_steps: int = MISSING
    """Forward passes in one optimizer step."""
    eval_batch_size: int = MISSING
    epochs: float = MISSING
    max_steps: int | None = MISSING
    """Optimizer steps; overrides `epochs` unless null."""
    logging_steps: int = MISSING
    eval_steps: int | None = MISSING
    """Score the validation split every so many steps; null scores it before and after training only."""
    save_steps: int = MISSING
    """Write a checkpoint every so many steps."""
    save_total_limit: int = MISSING
    """Keep this many checkpoints, the newest."""
    seed: int = MISSING
    """Decides the LoRA initialisation, the order of the rows and dropout."""

    def __post_init__(self) -> None:
        _require(self.beta > 0, "dpo.beta", self.beta, "use more than 0, such as 0.1")
        _require(self.learning_rate > 0, "dpo.learning_rate", self.learning_rate, "use more than 0, such as 1e-5")
        _require(bool(self.loss_type), "dpo.loss_type", self.loss_type, "name at least one loss")
        for name in self.loss_type:
            _one_of("dpo.loss_type", name, LOSS_TYPES)
        weights = self.loss_weights
        _require(
            weights is None or len(weights) == len(self.loss_type),
            "dpo.loss_weights", weights, f"give one weight for each of dpo.loss_type={self.loss_type}",
        )  # fmt: skip
        _require(0 <= self.label_smoothing < 0.5, "dpo.label_smoothing", self.label_smoothing, "use 0 up to 0.5")
        _require(
            self.label_smoothing > 0 or "exo_pair" not in self.loss_type,
            "dpo.label_smoothing", self.label_smoothing, "exo_pair wants more than 0, such as 1e-3",
        )  # fmt: skip
        _require(
            self.label_smoothing == 0 or not {*SMOOTHED_LOSSES}.isdisjoint(self.loss_type),
            "dpo.label_smoothing", self.label_smoothing, f"only {', '.join(SMOOTHED_LOSSES)} use it; set it to 0",
        )  # fmt: skip
        _one_of("dpo.lr_scheduler", self.lr_scheduler, SCHEDULERS)
        _one_of("dpo.optimizer", self.optimizer, OPTIMIZERS)
        _require(0 <= self.warmup_ratio < 1, "dpo.warmup_ratio", self.warmup_ratio, "use 0 or more and below 1")
        _require(self.weight_decay >= 0, "dpo.weight_decay", self.weight_decay, "use 0 or more")
        _require(self.max_grad_norm >= 0, "dpo.max_grad_norm", self.max_grad_norm, "use 0 or more")
        _require(self.epochs > 0, "dpo.epochs", self.epochs, "use more than 0")
        for key in (
            "batch_size", "gradient_accumulation_steps", "eval_batch_size", "max_steps",
            "logging_steps", "eval_steps", "save_steps", "save_total_limit",
        ):  # fmt: skip
            value = getattr(self, key)
            _require(value is None or value >= 1, f"dpo.{key}", value, "use 1 or more")


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
        _one_of("logging.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))


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
        _require(self.temperature > 0, "sampling.temperature", self.temperature, "use more than 0")
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "use more than 0 and up to 1")
        _require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "use 1 or more")


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
        _require(
            self.sample_steps is None or self.sample_steps >= 1,
            "logging.sample_steps",
            self.sample_steps,
            "use 1 or more",
        )


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    lora: LoraConfig = MISSING
    dpo: DpoConfig = MISSING
    logging: LoggingConfig = MISSING
    resume: str | None = MISSING
    """`latest` or the folder of an interrupted run to go on with; null starts a new one."""

    def __post_init__(self) -> None:
        _require(
            not (self.model.load_in_4bit and self.lora.init in ("pissa", "olora")),
            "lora.init", self.lora.init, "needs 16-bit weights to split; set model.load_in_4bit=false",
        )  # fmt: skip
        _require(
            not (self.lora.use_dora and self.lora.init in ("pissa", "olora")),
            "lora.init", self.lora.init, "cannot be saved with lora.use_dora=true; set lora.init=default",
        )  # fmt: skip


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
        _require(length is None or length >= 16, "model.max_length_tokens", length, "use 16 or more")
        if self.dtype is not None:
            _one_of("model.dtype", self.dtype, DTYPES)


@dataclass(slots=True, kw_only=True)
class InferConfig:
    run: str = MISSING
    """`latest` or a run folder."""
    prompt: str | None = MISSING
    """The question; null opens a conversation in a terminal."""
    system_prompt: str | None = MISSING
    """Replaces the run's system prompt; null keeps it."""
    model: ModelOverrides = MISSING
    sampling: SamplingConfig = MISSING


@dataclass(slots=True, kw_only=True)
class InspectConfig:
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    """Its tokenizer counts the tokens and renders the examples; no weights are loaded."""


def register() -> None:
    """Make the shapes known to Hydra, under the names the root YAML files build on."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="infer_schema", node=InferConfig)
    store.store(name="inspect_schema", node=InspectConfig)
