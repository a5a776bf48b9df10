"""The held-out pairs one by one, where TRL logs means only."""

from typing import Any

import torch

from fitness_dpo.health import Pairs
from fitness_dpo.packing import PACKED


@torch.no_grad()
def held_out_pairs(trainer: Any) -> Pairs:
    """Log-probability differences and length differences of the trainer's validation pairs (of this process's share)."""
    pairs = Pairs([], [], [])
    trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        inputs = trainer._prepare_inputs(batch)
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        with trainer.compute_loss_context_manager():
            given = {name: inputs[name] for name in ("input_ids", "attention_mask", PACKED) if name in inputs}
            logps = trainer.model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        if "ref_chosen_logps" in inputs:
            chosen, rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
        half = len(logps) // 2
        lengths = mask.sum(1)
        pairs.before.extend((chosen - rejected).tolist())
        pairs.after.extend((logps[:half] - logps[half:]).tolist())
        pairs.length_differences.extend((lengths[:half] - lengths[half:]).tolist())
    return pairs
