"""The held-out pairs one by one, where TRL logs means only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fitness_dpo.health import Pairs

Gather = Callable[[Tensor], Tensor]
"""The values of all processes that train together, in order of rank."""


@contextmanager
def each_pair(found: Pairs, inputs: dict[str, Any], gather: Gather, *models: Any) -> Iterator[None]:
    """Add the pairs of every process's batch to `found`, from the log-probabilities that TRL asks the `models` for in the meantime: the
    policy's, then, unless `inputs` bring them, the reference's."""
    asked: list[Any] = []
    hooks = [
        model.register_forward_hook(lambda *call: asked.append(call[-1].log_probs.sum(1)))
        for model in models
        if model is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    chosen, rejected = asked[0].chunk(2)
    if "ref_chosen_logps" in inputs:
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    else:
        reference = asked[1].chunk(2)
    lengths = inputs["completion_mask"].sum(1).chunk(2)
    found.before.extend(gather(reference[0] - reference[1]).tolist())
    found.after.extend(gather(chosen - rejected).tolist())
    found.length_differences.extend(gather(lengths[0] - lengths[1]).tolist())
