"""The held-out pairs one by one, where TRL logs means only."""

from typing import Any

import torch

from fitness_dpo.health import Pairs


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
            logps = trainer.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, use_cache=False,
                fused_lm_head=True,
            ).log_probs.sum(1)  # fmt: skip
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
