"""TRL's DPOTrainer, given the arguments, the rows and the callbacks of a run. Import it after the model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import trl
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from fitness_dpo import runs
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.data import Example
from fitness_dpo.distributed import world_size
from fitness_dpo.logprobs import fill_trl_slot
from fitness_dpo.model import Policy, compute_dtype, load_base
from fitness_dpo.packed_model import obstacle, starts_at_base
from fitness_dpo.preference_trainer import PreferenceTrainer
from fitness_dpo.template import ChatTemplate


class TokenizedRows(NamedTuple):
    rows: datasets.Dataset
    """prompt_ids, chosen_ids, rejected_ids: what TRL's collator pads and concatenates."""
    too_long: int
    """Rows left out because an answer would have been cut at max_length_tokens."""


def dpo_arguments(config: TrainConfig, run: Path, dtype: torch.dtype, *, validate: bool) -> dict[str, Any]:
    """Every keyword of trl.DPOConfig that a run sets. Pure. Named in full, since Unsloth's trainer has defaults of its own."""
    dpo, logging = config.dpo, config.logging
    return {
        "output_dir": str(run / runs.CHECKPOINTS),
        "beta": dpo.beta,
        "loss_type": dpo.loss_type,
        "loss_weights": dpo.loss_weights,
        "label_smoothing": dpo.label_smoothing,
        "precompute_ref_log_probs": False,  # PreferenceTrainer does, from the cache
        "max_length": config.model.max_length_tokens,
        "disable_dropout": config.lora.dropout == 0,
        "learning_rate": dpo.learning_rate,
        "lr_scheduler_type": dpo.lr_scheduler,
        "warmup_steps": dpo.warmup_ratio,
        "optim": dpo.optimizer,
        "weight_decay": dpo.weight_decay,
        "max_grad_norm": dpo.max_grad_norm,
        "per_device_train_batch_size": dpo.batch_size,
        "per_device_eval_batch_size": dpo.eval_batch_size,
        "gradient_accumulation_steps": dpo.gradient_accumulation_steps,
        "num_train_epochs": dpo.epochs,
        "max_steps": dpo.max_steps or -1,
        "logging_steps": dpo.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it hides what the health verdicts look for, and makes every step wait for the GPU
        "eval_strategy": "steps" if dpo.eval_steps and validate else "no",
        "eval_steps": dpo.eval_steps,
        "save_strategy": "steps",
        "save_steps": dpo.save_steps,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_checkpointing": config.model.gradient_checkpointing != "false",
        "seed": dpo.seed,
        "data_seed": dpo.seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": 2 if torch.cuda.is_available() else 0,  # a GPU computes faster than one core collates
        "dataloader_persistent_workers": torch.cuda.is_available(),
        "report_to": ["tensorboard"] if logging.tensorboard else [],  # wandb has a callback of its own
        "run_name": logging.wandb.name or "-".join(run.parts[-2:]),
    }


def tokenize(examples: list[Example], template: ChatTemplate, max_length_tokens: int) -> TokenizedRows:
    """Token ids of every pair that fits into `max_length_tokens` whole."""
    pairs = [template.pair_ids(example.prompt, example.chosen, example.rejected) for example in examples]
    fitting = [pair._asdict() for pair in pairs if pair.length <= max_length_tokens]
    return TokenizedRows(datasets.Dataset.from_list(fitting), len(pairs) - len(fitting))


def packs(config: TrainConfig, model: Any) -> bool:
    """Whether the packed forward serves this run. Raises InputError where it was asked for by name and cannot."""
    if config.dpo.forward == "padded":
        return False
    reason = obstacle(model, config.lora)
    if reason is None and not starts_at_base(model):
        reason = f"lora.init={config.lora.init} starts away from the base, which it takes for the reference"
    if reason is not None and config.dpo.forward == "packed":
        raise InputError(f"dpo.forward=packed: {reason}; set dpo.forward=auto")
    return reason is None


def build_trainer(
    config: TrainConfig,
    policy: Policy,
    splits: dict[str, list[Example]],
    run: Path,
    callbacks: Sequence[TrainerCallback],
) -> PreferenceTrainer:
    """A DPOTrainer over the train split that watches the validation split, where there is one."""
    template = ChatTemplate(policy.tokenizer)
    limit = config.model.max_length_tokens
    train = tokenize(splits["train"], template, limit)
    if not len(train.rows):
        raise InputError(
            f"model.max_length_tokens={limit}: every one of {train.too_long} training rows is longer; raise it"
        )
    rows = train.rows
    if config.dpo.max_steps is not None:  # leave the rows that no step reaches out of the reference pass
        pairs_a_step = config.dpo.batch_size * config.dpo.gradient_accumulation_steps * world_size()
        reached = min(len(rows), config.dpo.max_steps * pairs_a_step)
        rows = rows.shuffle(seed=config.dpo.seed).select(range(reached))
    validation = tokenize(splits["validation"], template, limit)
    validate = len(validation.rows) > 0
    if not torch.cuda.is_available() and config.model.backend == "transformers":
        fill_trl_slot()
    packed = packs(config, policy.model)
    # TRL's reference is a second adapter, and PEFT allows one adapter only where biases are trained: a second model then.
    reference = load_base(config.model).model if config.lora.bias != "none" else None

    trainer = PreferenceTrainer(
        model=policy.model,
        ref_model=reference,
        args=trl.DPOConfig(**dpo_arguments(config, run, compute_dtype(config.model.dtype), validate=validate)),
        train_dataset=rows,
        eval_dataset=validation.rows if validate else None,
        processing_class=policy.tokenizer,
        callbacks=list(callbacks),
        config=config,
        packed=packed,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.too_long = {"train": train.too_long, "validation": validation.too_long}
    return trainer
