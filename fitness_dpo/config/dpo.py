"""conf/dpo: the loss, the optimizer and the schedule."""

from dataclasses import dataclass

from omegaconf import MISSING

from fitness_dpo.config.checks import one_of, require

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
    forward: str = MISSING
    """`packed` computes no padding and each prompt once for its two answers; `padded` is TRL's own; `auto` is packed
    wherever the model and the adapter allow it."""
    compile: str = MISSING
    """Compile the packed forward's layers: `true`, `false`, or `auto`, which does on a GPU for runs of 300 steps and more."""
    micro_batch_tokens: int | None = MISSING
    """Divide a batch into parts of at most this many tokens (prompt, chosen and rejected), pairs of like length
    together; the gradient stays that of the whole batch. Null computes a batch at once. Not where several processes train
    together."""
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
    """Score the validation split every so many steps; null scores it after training only."""
    save_steps: int = MISSING
    """Write a checkpoint every so many steps."""
    save_total_limit: int = MISSING
    """Keep this many checkpoints, the newest."""
    seed: int = MISSING
    """Decides the LoRA initialisation, the order of the rows and dropout."""

    def __post_init__(self) -> None:
        require(self.beta > 0, "dpo.beta", self.beta, "use more than 0, such as 0.1")
        require(self.learning_rate > 0, "dpo.learning_rate", self.learning_rate, "use more than 0, such as 1e-5")
        require(bool(self.loss_type), "dpo.loss_type", self.loss_type, "name at least one loss")
        for name in self.loss_type:
            one_of("dpo.loss_type", name, LOSS_TYPES)
        weights = self.loss_weights
        require(
            weights is None or len(weights) == len(self.loss_type),
            "dpo.loss_weights", weights, f"give one weight for each of dpo.loss_type={self.loss_type}",
        )  # fmt: skip
        require(0 <= self.label_smoothing < 0.5, "dpo.label_smoothing", self.label_smoothing, "use 0 up to 0.5")
        require(
            self.label_smoothing > 0 or "exo_pair" not in self.loss_type,
            "dpo.label_smoothing", self.label_smoothing, "exo_pair wants more than 0, such as 1e-3",
        )  # fmt: skip
        require(
            self.label_smoothing == 0 or not {*SMOOTHED_LOSSES}.isdisjoint(self.loss_type),
            "dpo.label_smoothing", self.label_smoothing, f"only {', '.join(SMOOTHED_LOSSES)} use it; set it to 0",
        )  # fmt: skip
        one_of("dpo.forward", self.forward, ("auto", "packed", "padded"))
        self.compile = self.compile.lower()  # Hydra reads a bare true as a truth value, and writes it True
        one_of("dpo.compile", self.compile, ("auto", "true", "false"))
        one_of("dpo.lr_scheduler", self.lr_scheduler, SCHEDULERS)
        one_of("dpo.optimizer", self.optimizer, OPTIMIZERS)
        require(0 <= self.warmup_ratio < 1, "dpo.warmup_ratio", self.warmup_ratio, "use 0 or more and below 1")
        require(self.weight_decay >= 0, "dpo.weight_decay", self.weight_decay, "use 0 or more")
        require(self.max_grad_norm >= 0, "dpo.max_grad_norm", self.max_grad_norm, "use 0 or more")
        require(self.epochs > 0, "dpo.epochs", self.epochs, "use more than 0")
        for key in (
            "batch_size", "gradient_accumulation_steps", "eval_batch_size", "max_steps",
            "logging_steps", "eval_steps", "save_steps", "save_total_limit", "micro_batch_tokens",
        ):  # fmt: skip
            value = getattr(self, key)
            require(value is None or value >= 1, f"dpo.{key}", value, "use 1 or more")
