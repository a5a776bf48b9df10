"""A run's adapter and its base -> one model that needs neither PEFT nor this project."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from fitness_dpo import runs
from fitness_dpo.config import InputError, ModelConfig, TrainConfig
from fitness_dpo.data import standardise
from fitness_dpo.folder import new_folder, require_room
from fitness_dpo.inference import end_tokens
from fitness_dpo.model import Policy, load_trained

BESIDE_WEIGHTS_BYTES = 20_000_000
"""Room for tokenizer, settings and model card."""


def merge(run: Path, folder: Path, dtype: str = "bfloat16") -> Path:
    """`folder`, now holding the merged model of a finished run: safetensors, tokenizer, chat template, stop tokens.

    dtype: what the weights are stored in; "float32" answers exactly as the adapter does. Raises InputError where the base
    can't be had, the disk has no room or `folder` holds something else.
    """
    trained = runs.load_config(run, TrainConfig)
    policy = load_exact(run, trained.model)
    require_room(folder, weights_bytes(policy, dtype) + BESIDE_WEIGHTS_BYTES)
    with new_folder(folder, {"run_id": runs.run_id(run), "format": "merged", "dtype": dtype}) as beside:
        write_merged(policy, system_prompt(trained), dtype, beside)
    return folder


def load_exact(run: Path, config: ModelConfig) -> Policy:
    """The run's adapter over its base in float32, also where it was trained over 4-bit weights.

    Raises InputError for a base that is stored in fewer than 16 bits.
    """
    policy = load_trained(run, replace(config, load_in_4bit=False, dtype="float32"))
    if getattr(policy.model, "is_quantized", False):
        raise InputError(
            f"model.name={config.name}: its weights are stored quantized; name the 16-bit model they were made from with base="
        )
    return policy


def weights_bytes(policy: Policy, dtype: str) -> int:
    """What the merged weights take on disk, and a few hundredths more: the adapter is counted too."""
    return int(policy.model.num_parameters() * getattr(torch, dtype).itemsize)


def write_merged(policy: Policy, system: str | None, dtype: str, folder: Path) -> None:
    """Merge the adapter into its base, which is used up, and write the model, its tokenizer and settings into `folder`.

    W + (alpha / r) B A is added up in float32 and rounded once, to `dtype`.
    """
    ends = end_tokens(policy)
    try:
        model = policy.model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaNs detected" not in str(error):
            raise
        raise InputError(
            "run: its adapter holds numbers that are not finite, so the training failed; train again"
        ) from error
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(  # greedy, as the bot answers
        do_sample=False, eos_token_id=ends, pad_token_id=policy.tokenizer.pad_token_id
    )
    model.save_pretrained(str(folder))
    policy.tokenizer.save_pretrained(str(folder))
    template = folder / "chat_template.jinja"
    template.write_text(with_defaults(policy.tokenizer.get_chat_template(), system), encoding="utf-8")


def system_prompt(trained: TrainConfig) -> str | None:
    """What stood before every question in training."""
    text = trained.data.system_prompt
    return standardise(text) if text and trained.data.standardise else text


def with_defaults(template: str, system: str | None) -> str:
    """The chat template with the run's habits built in, so that any program that renders it asks as training did.

    Thinking mode is off, and a conversation that brings no system message begins with the run's own.
    """
    habits = ""
    if "enable_thinking" in template:
        habits += "{%- set enable_thinking = false %}\n"
    if system:
        literal = json.dumps(system, ensure_ascii=False)
        habits += (
            "{%- if messages[0]['role'] != 'system' %}\n"
            f"{{%- set messages = [{{'role': 'system', 'content': {literal}}}] + messages %}}\n"
            "{%- endif %}\n"
        )
    return habits + template
