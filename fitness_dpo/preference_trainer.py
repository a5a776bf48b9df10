"""TRL's DPOTrainer with a packed forward, a reference that is read from the cache, and micro-batches of like size.

The losses, their metrics and the training loop are TRL's and transformers' own. Import it after Unsloth.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
import torch
import trl

from fitness_dpo import distributed
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.graphs import Recorder
from fitness_dpo.health import Pairs
from fitness_dpo.joined import join
from fitness_dpo.margins import each_pair
from fitness_dpo.packed_model import PackedForward, starts_at_base
from fitness_dpo.packing import HostBatch, PackedCollator, common_start, usual
from fitness_dpo.reference import Logps, Pair, fingerprint, reference_logps

MICRO_BATCHES = "micro_batches"
STEPS_WORTH_COMPILING = 300
NOT_ON_HOST = {"exo_pair"}
"""Losses for which TRL makes constants on the trainer's device, wherever the log-probabilities are."""
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd")
"""Optimizers to which it is the same how numbers are divided into parameters; Adafactor looks at rows and columns, and those of 8
bits spare small ones."""
Collate = Callable[[list[Any]], dict[str, Any]]


class PreferenceTrainer(trl.DPOTrainer):  # type: ignore[misc]
    train_dataset: datasets.Dataset
    eval_dataset: datasets.Dataset | None
    data_collator: Collate
    optimizer: Any

    def __init__(self, config: TrainConfig, *, packed: bool, **given: Any) -> None:
        super().__init__(**given)
        self.config, self.packed, self.share = config, packed, 1.0
        self.batch_sizes: list[int] = []
        self.weights = self.model.num_parameters(exclude_embeddings=True)
        # in 32 bits: TRL rounds them to bfloat16 beside 4-bit weights, where small updates vanish
        self.joined = {join(parameters): decay for parameters, decay in self.by_decay() if parameters}
        walk_less(self.model, list(self.joined))
        if self.args.world_size > 1:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise InputError(
                    "accelerate launch: FSDP and DeepSpeed divide a model, and here each GPU holds a whole one; launch with --multi_gpu alone"
                )
            for whole in self.joined:
                distributed.agree(whole.data)
            self.accelerator.gather = distributed.gather
        # where it is, since a move would part what is joined, and without DDP, whose hooks keep a step from being recorded:
        # training_step averages the gradients
        prepare = partial(self.accelerator.prepare_model, device_placement=False, evaluation_mode=True)
        self.accelerator.prepare_model = lambda model, **_: prepare(model)
        if packed:
            self.compiled = compiles(config.dpo.compile, planned_steps(self.args, len(self.train_dataset)))
            pairs = [*self.train_dataset, *(self.eval_dataset or [])]
            forward = PackedForward(
                self.model, compiled=self.compiled, checkpointing=config.model.gradient_checkpointing,
                whole=next(iter(self.joined)),
            )  # fmt: skip
            self.attention = forward.attention
            prefix = common_start(pair["prompt_ids"] for pair in pairs)
            on_host = not set(self.loss_types) & NOT_ON_HOST
            if on_host and torch.cuda.is_available():
                torch.set_num_threads(1)  # a loss is sooner computed than other threads are woken
            self.data_collator = PackedCollator(
                self.processing_class.pad_token_id,
                prefix,
                usual(pairs, len(prefix)) if isinstance(forward.tuned_scores, Recorder) else None,
                on_host=on_host,
            )
        if config.dpo.precompute_reference:
            self.precompute_ref_logps = True
            self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", config.dpo.eval_batch_size)
            if self.eval_dataset is not None:
                self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", config.dpo.eval_batch_size)

    def by_decay(self) -> list[tuple[list[torch.nn.Parameter], float]]:
        """The parameters that are trained with weight decay and those without, as transformers divides them."""
        decayed = {*self.get_decay_parameter_names(self.model)}
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return [
            ([parameter for name, parameter in named if (name in decayed) == decays], decays * self.args.weight_decay)
            for decays in (True, False)
        ]

    def create_optimizer(self, *given: Any) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.optim in ELEMENTWISE:
            groups = [{"params": [whole], "weight_decay": decay} for whole, decay in self.joined.items()]
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **settings)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*given)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # torch's, of other groups of parameters
            raise InputError(
                f"resume: {checkpoint} has the state of another optimizer, or of an earlier version's; start anew ({error})"
            ) from error

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """As it is: rows are tokenized already, so that one template serves training and answering."""
        return dataset

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """The held-out figures; `held_out` has the pairs one by one, in order. Leaves training's random state as it was: a
        resumed run may skip an evaluation."""
        self.held_out, self.batch_sizes = Pairs([], [], []), []
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            figures: dict[str, float] = super().evaluate(*arguments, **named)
        rows = len(self.eval_dataset or [])  # several processes fill their last batches up with the first rows again
        before, after, length_differences = self.held_out
        self.held_out = Pairs(before[:rows], after[:rows], length_differences[:rows])
        return figures

    def log(self, logs: dict[str, float], *given: Any) -> None:
        """TRL logs an evaluation's mean over batches, of which the last is smaller; here it is the mean over pairs."""
        if not self.model.training:
            weigh_metrics(self._metrics["eval"], [size / sum(self.batch_sizes) for size in self.batch_sizes])
        super().log(logs, *given)

    def _precompute_ref_logps(self, dataset: datasets.Dataset, name: str, batch_size: int) -> datasets.Dataset:
        """`dataset` with the reference's log-probabilities, from the cache where they are known."""

        def compute(pairs: list[Pair]) -> Iterator[Logps]:
            order = sorted(range(len(pairs)), key=lambda place: -pair_tokens(pairs[place]))
            found: dict[int, Logps] = {}
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                batch = self._prepare_inputs(self.data_collator([pairs[place] for place in places]))
                chosen, rejected = (side.tolist() for side in self.compute_ref_log_probs(self.model, batch))
                found |= zip(places, map(Logps, chosen, rejected), strict=True)
            return (found[place] for place in range(len(pairs)))

        base = fingerprint(
            self.ref_model or self.model,
            with_adapter=self.ref_model is None and not starts_at_base(self.model),
            settings=[self.attention if self.packed else "padded", str(self.accelerator.mixed_precision)],
        )
        logps = reference_logps(
            base, list(dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])), compute
        )
        return dataset.add_column("ref_chosen_logps", [each.chosen for each in logps]).add_column(
            "ref_rejected_logps", [each.rejected for each in logps]
        )

    def get_train_dataloader(self) -> Any:
        budget = self.config.dpo.micro_batch_tokens
        if budget is None:
            return super().get_train_dataloader()
        whole = self.data_collator
        self.data_collator = lambda pairs: {MICRO_BATCHES: [whole(part) for part in divide(pairs, budget)]}
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One batch, in its micro-batches: their gradients add up to that of the mean over all its pairs, and before an optimizer
        step to that over all processes' pairs."""
        parts = inputs.get(MICRO_BATCHES, [inputs])
        shares = [len(part["input_ids"]) for part in parts]
        losses = []
        for part, share in zip(parts, shares, strict=True):
            self.share = share / sum(shares)
            losses.append(super().training_step(model, part, num_items_in_batch))
        weigh_metrics(self._metrics["train"], [share / sum(shares) for share in shares])
        if self.args.world_size > 1 and self.accelerator.sync_gradients:
            for whole in self.joined:
                distributed.average(whole.grad)  # type: ignore[arg-type]
        return torch.stack(losses).sum().to(self.args.device, non_blocking=True)  # behind the backward pass, not after

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Transformers' estimate, with the weights counted once instead of at each step."""
        parts = inputs.get(MICRO_BATCHES, [inputs])
        return sum(6 * part["input_ids"].numel() * self.weights for part in parts)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(list(self.joined), self.args.max_grad_norm)
        return norm

    def _prepare_input(self, data: Any) -> Any:
        return data.to(self.args.device) if isinstance(data, HostBatch) else super()._prepare_input(data)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
        if self.model.training:
            loss = super().compute_loss(model, inputs, *given, **named) * self.share
            # it follows its backward pass to the GPU, unless float16's scaler wants it there before
            return loss if self.accelerator.scaler is None else loss.to(self.args.device)
        self.batch_sizes.append(len(inputs["input_ids"]))
        with each_pair(self.held_out, inputs, self.accelerator.gather, self.model, self.ref_model):
            return super().compute_loss(model, inputs, *given, **named).to(self.args.device)


def walk_less(model: Any, wholes: list[torch.nn.Parameter]) -> None:
    """Spare `model` the walks through some thousand modules that transformers' loop takes at each step to set its mode and to
    forget its gradients, those of `wholes` (docs/performance.md)."""
    change = model.train

    def train(mode: bool = True) -> Any:
        return model if model.training == mode else change(mode)

    def zero_grad() -> None:
        for whole in wholes:
            whole.grad.zero_()  # type: ignore[union-attr]

    model.train, model.zero_grad = train, zero_grad


def compiles(setting: str, steps: int) -> bool:
    """`auto` compiles on a GPU for a run that is long enough to win the time back (docs/performance.md)."""
    return torch.cuda.is_available() and steps >= STEPS_WORTH_COMPILING if setting == "auto" else setting == "true"


def planned_steps(args: Any, rows: int) -> int:
    pairs_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return int(args.max_steps if args.max_steps > 0 else args.num_train_epochs * rows / pairs_a_step)


def pair_length(pair: Pair) -> int:
    """Tokens of the longer of the two sequences."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def pair_tokens(pair: Pair) -> int:
    return sum(len(pair[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected"))


def divide(pairs: list[Pair], budget: int) -> list[list[Pair]]:
    """Pairs of like length together, as many as hold `budget` tokens, a longer pair alone."""
    parts: list[list[Pair]] = []
    filled = budget
    for pair in sorted(pairs, key=pair_tokens):
        tokens = pair_tokens(pair)
        if filled + tokens > budget:
            parts.append([])
            filled = 0
        parts[-1].append(pair)
        filled += tokens
    return parts


def weigh_metrics(metrics: dict[str, list[float]], shares: list[float]) -> None:
    """Make one weighted mean of the values that each micro-batch added."""
    for values in metrics.values():
        if len(values) >= len(shares):
            values[-len(shares) :] = [
                sum(share * value for share, value in zip(shares, values[-len(shares) :], strict=True))
            ]
