"""The README.md of an export: data, recipe, scores, limits, licence. Imports no torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from fitness_dpo import runs
from fitness_dpo.config import TrainConfig
from fitness_dpo.weights import EMBEDDED_PREFIX

EMBEDDED_BASE, EMBEDDED_LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"  # pragma: allowlist secret
UNKNOWN_LICENSE = "other"


def model_card(
    name: str, run: Path, trained: TrainConfig, base: str, license_name: str | None, differences: list[str]
) -> str:
    """Markdown with the hub's front matter.

    base: the model.name that was merged into. differences: a line for each model that was compared with the run.
    """
    known = license_name or license_of(base, trained.model.revision)
    origin = EMBEDDED_BASE if base.startswith(EMBEDDED_PREFIX) else base
    on_hub = origin.count("/") == 1 and not Path(origin).exists()
    front = [
        "---", f"license: {known}", *([f"base_model: {origin}"] if on_hub else []), "library_name: transformers",
        "pipeline_tag: text-generation", "tags: [dpo, lora, preference-tuning]", "---",
    ]  # fmt: skip
    licence = (
        "The base model names none that was found here: ask its makers before you pass this on."
        if known == UNKNOWN_LICENSE
        else f"{known}, as the base model."
    )
    body = [
        f"# {name}",
        f"{Path(origin).name if not on_hub else origin}, tuned with LoRA and Direct Preference Optimization (DPO) on pairs of a "
        "better and a worse answer to the same question. Made with fitness_dpo.",
        "The chat template brings the system prompt of the training and keeps thinking mode off, so a conversation needs neither.",
        "## Data",
        "\n".join(data(run, trained)),
        "## Recipe",
        "\n".join(recipe(run, trained)),
        "## Scores",
        "\n".join(scores(run)) or "None were measured.",
        "## Beside the run it was made from",
        "\n".join(f"- {line}" for line in differences) or "Not compared.",
        "## Limits",
        "It answers fluently where it is wrong, knows nothing of the person who asks but what they write, and was scored on one "
        "data set only. It is no medical advice: whoever has pain, an illness or takes medicines asks a doctor.",
        "## Licence",
        licence,
    ]
    return "\n".join(front) + "\n\n" + "\n\n".join(body) + "\n"


def license_of(base: str, revision: str | None) -> str:
    """The licence that the base model's own card names, by its SPDX name, or `other`."""
    if base.startswith(EMBEDDED_PREFIX):
        return EMBEDDED_LICENSE
    card: Any = Path(base).expanduser() / "README.md"
    if not Path(base).expanduser().is_dir():
        card = try_to_load_from_cache(base, "README.md", revision=revision)
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return UNKNOWN_LICENSE
    known = ModelCard.load(card).data.license
    return known if isinstance(known, str) else UNKNOWN_LICENSE


def data(run: Path, trained: TrainConfig) -> Iterator[str]:
    rows = _read(run / runs.METRICS)["rows"]
    names = ", ".join(Path(path).name for path in trained.data.weights)
    yield f"- preference set: {names}"
    yield f"- pairs: {rows['train']} for training, {rows['validation']} to watch it, {rows['test']} kept for the test"
    for split, digest in (runs.read_record(run) or {}).get("dataset", {}).items():
        yield f"- SHA-256 of the {split} pairs: `{digest}`"
    if trained.data.system_prompt:
        yield f"- system prompt: {' '.join(trained.data.system_prompt.split())}"


def recipe(run: Path, trained: TrainConfig) -> Iterator[str]:
    dpo, lora = trained.dpo, trained.lora
    yield f"- loss: {', '.join(dpo.loss_type)}, beta {dpo.beta:g}"
    yield (
        f"- {_read(run / runs.METRICS)['steps']} steps of {dpo.batch_size * dpo.gradient_accumulation_steps} pairs, learning rate "
        f"{dpo.learning_rate:g} ({dpo.lr_scheduler}), {dpo.optimizer}, seed {dpo.seed}"
    )
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    yield f"- LoRA: rank {lora.r}, alpha {lora.alpha}, on {targets}"
    weights = "4-bit (NF4)" if trained.model.load_in_4bit else "16- or 32-bit"
    yield f"- frozen weights in training: {weights}"
    packages = (runs.read_record(run) or {}).get("packages", {})
    yield f"- versions: {', '.join(f'{name} {version}' for name, version in packages.items())}"


def scores(run: Path) -> Iterator[str]:
    """Lines of figures: those of the training's own validation, and the evaluation's where there was one."""
    trained = _read(run / runs.METRICS)
    after = trained["after"]
    if after:
        yield f"- preference accuracy on validation pairs: {after['eval_rewards/accuracies']:.3f} (guessing gets 0.5)"
        yield f"- reward margin on validation pairs: {after['eval_rewards/margins']:.3f} (0 before)"
    file = run / "evaluation" / "metrics.json"
    if not file.is_file():
        return
    found = _read(file)
    yield f"- preference accuracy on {found['rows']} {found['split']} pairs: {_interval(found['preference']['accuracy'])}"
    for part, figure, words in (
        ("quiz", "per_byte", "quiz"), ("safety", "care_passed", "questions that need a doctor, passed on to one"),
    ):  # fmt: skip
        if found.get(part):
            base, tuned = found[part]["base"][figure], found[part]["tuned"][figure]
            yield f"- {words}: {_interval(base)} before, {_interval(tuned)} after"


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}, 95%)"


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
