"""What a training step will take on the GPU, said before the first one where it is more than there is."""

import sys
from typing import Any, NamedTuple

import torch

from fitness_dpo.config import TrainConfig
from fitness_dpo.distributed import rank, world_size
from fitness_dpo.logprobs import CHUNK_LOGITS, CHUNK_TOKENS
from fitness_dpo.packed_model import KNOWN_MODELS
from fitness_dpo.packing import bucket
from fitness_dpo.preference_trainer import PreferenceTrainer, divide, pair_length, pair_tokens

UNFUSED = 1.5
"""Times what a layer keeps where norms and activations are operations by themselves: not compiled, nor Unsloth's."""
LOGIT_BYTES = 18
"""One in 16 bits, and four of 4 bytes: itself, what its exponential is made from, its probability, and their product."""


class Decoder(NamedTuple):
    """The sizes of a Llama-like model that count."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together."""
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Decoder":
        """From a transformers config."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads * width,
            config.num_key_value_heads * width, config.vocab_size,
        )  # fmt: skip


def activation_bytes(
    model: Decoder, tokens: int, item_bytes: int, *, packed: bool, fused: bool, checkpointing: str
) -> int:
    """What the forward pass of `tokens` tokens keeps for the backward pass, and the logits of one chunk.

    A layer keeps for each token: its input and the residual, both as they are and normalised; queries, keys and values, the first two
    rotated too; the attention's output, and again beside LoRA's part of it; gate, up and their product. With checkpointing `true` one layer keeps that and the others their
    input; with `unsloth` the inputs are in the host's memory.
    """
    layer = 4 * model.hidden + 4 * model.queries + 3 * model.keys + 3 * model.intermediate
    layer = layer if fused else int(layer * UNFUSED)
    kept = {
        "false": model.layers * layer,
        "true": model.layers * model.hidden + layer,
        "unsloth": layer,
    }[checkpointing]
    chunk = CHUNK_LOGITS if packed else CHUNK_TOKENS * model.vocabulary
    return tokens * kept * item_bytes + min(chunk, tokens * model.vocabulary) * LOGIT_BYTES


def trained_bytes(parameters: int) -> int:
    """Gradient and both moments of Adam, in fp32, beside the parameters themselves."""
    return 3 * 4 * parameters


def most_tokens(pairs: list[Any], batch_size: int, budget: int | None, *, packed: bool) -> int:
    """Tokens that one forward pass takes at most: `batch_size` of the longest pairs, or the fullest part of them that `budget` allows."""
    longest = sorted(pairs, key=pair_tokens)[-batch_size:]
    parts = [longest] if budget is None else divide(longest, budget)
    if packed:
        return max(bucket(sum(map(pair_tokens, part))) for part in parts)
    return max(2 * len(part) * max(map(pair_length, part)) for part in parts)


def warn_of_memory(config: TrainConfig, trainer: PreferenceTrainer) -> None:
    """One line where a step of the longest rows is likely to run out of GPU memory. Says nothing of models it does not know."""
    model = trainer.model
    if rank() > 0 or not torch.cuda.is_available() or model.config.model_type not in KNOWN_MODELS:
        return
    tokens = most_tokens(
        list(trainer.train_dataset), config.dpo.batch_size, config.dpo.micro_batch_tokens, packed=trainer.packed
    )
    item_bytes = model.get_input_embeddings().weight.element_size()
    wanted = trained_bytes(sum(whole.numel() for whole in trainer.joined)) + activation_bytes(
        Decoder.of(model.config), tokens, item_bytes, packed=trainer.packed,
        fused=trainer.compiled if trainer.packed else config.model.backend == "unsloth",
        checkpointing=config.model.gradient_checkpointing,
    )  # fmt: skip
    held = torch.cuda.memory_allocated()  # the weights, by now
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - held
    if wanted > free:
        sys.stderr.write(
            f"memory: a step of the longest rows takes about {(held + wanted) / 2**30:.1f} GiB, and "
            f"{(held + free) / 2**30:.1f} GiB of the GPU are there; {mends(config)}\n"
        )


def mends(config: TrainConfig) -> str:
    """The settings that lower memory and are not at their lowest, the gentlest first."""
    model, dpo = config.model, config.dpo
    numbers = [
        (dpo.batch_size > 1, f"dpo.batch_size={dpo.batch_size} (and raise dpo.gradient_accumulation_steps)"),
        (dpo.micro_batch_tokens is not None, f"dpo.micro_batch_tokens={dpo.micro_batch_tokens}"),
        (dpo.eval_batch_size > 1, f"dpo.eval_batch_size={dpo.eval_batch_size}"),
        (True, f"model.max_length_tokens={model.max_length_tokens}"),
    ]
    switches = [
        (
            dpo.micro_batch_tokens is None and dpo.batch_size > 1 and world_size() == 1,
            f"dpo.micro_batch_tokens={model.max_length_tokens}",
        ),
        (model.gradient_checkpointing == "false", 'model.gradient_checkpointing="true"'),
        (
            model.gradient_checkpointing == "true" and model.backend == "unsloth",
            "model.gradient_checkpointing=unsloth",
        ),
        (not model.load_in_4bit, "model.load_in_4bit=true"),
    ]
    lower = ", ".join(mend for possible, mend in numbers if possible)
    switch = " or ".join(mend for possible, mend in switches if possible)
    return f"lower {lower}" + (f", or set {switch}" if switch else "")
