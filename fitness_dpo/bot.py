"""What answers: a run's model with the adapter it trained, or a model as it is. infer, chat and serve all find it here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fitness_dpo import runs
from fitness_dpo.config import BotConfig, InputError, ModelConfig, TrainConfig
from fitness_dpo.config.checks import require
from fitness_dpo.model import Policy, compute_dtype, load_base, load_trained, override

UNTUNED = ModelConfig(
    name="none", revision=None, backend="transformers", max_length_tokens=2048, load_in_4bit=False, dtype="auto",
    gradient_checkpointing="false", trust_remote_code=False,
)  # fmt: skip


class Bot(NamedTuple):
    model: ModelConfig
    run: Path | None
    """The run whose adapter answers; None for a model as it is."""
    system_prompt: str | None
    standardised: bool
    """Whether questions are cleaned as the training rows were."""

    @property
    def name(self) -> str:
        return self.model.name if self.run is None else str(self.run)


def find(config: BotConfig) -> Bot:
    """The bot of these settings. Imports no torch; raises InputError for a run that is missing or unfinished."""
    if config.model.name is not None:
        mend = f"model.name={config.model.name} answers without a run; leave one of them out"
        require(config.run == "latest", "run", config.run, mend)
        return Bot(override(UNTUNED, config.model), None, config.system_prompt, standardised=True)
    run = runs.finished_run(config.run)
    trained = runs.load_config(run, TrainConfig)
    system_prompt = trained.data.system_prompt if config.system_prompt is None else config.system_prompt
    return Bot(override(trained.model, config.model), run, system_prompt, trained.data.standardise)


def load(bot: Bot, *, merged: bool) -> Policy:
    """The bot's model, ready to answer. `merged` adds the adapter into the weights: faster, but `untuned` needs it apart.

    Weights in 4 bits stay apart from their adapter in any case: adding would round them anew.
    """
    if bot.run is None:
        policy = load_base(bot.model)
    elif merged and not bot.model.load_in_4bit:
        policy = load_merged(bot.run, bot.model)
    else:
        policy = load_trained(bot.run, bot.model)
    window, longest = bot.model.max_length_tokens, getattr(policy.model.config, "max_position_embeddings", None)
    mend = f"this model reads {longest} tokens at most; set it so"
    require(longest is None or window <= longest, "model.max_length_tokens", window, mend)
    return policy


def load_merged(run: Path, config: ModelConfig) -> Policy:
    """The run's model with its adapter added into the weights in float32, as export writes it."""
    from fitness_dpo.merge import load_exact

    dtype = compute_dtype(config.dtype)
    policy = load_exact(run, config)
    return policy._replace(model=policy.model.merge_and_unload(safe_merge=True).to(dtype))


@contextmanager
def untuned(model: Any) -> Iterator[None]:
    """The model without its adapter, as it was before training."""
    if not hasattr(model, "disable_adapter"):
        raise InputError("model.name: this model has no adapter to switch off; it is the untuned one")
    with model.disable_adapter():
        yield
