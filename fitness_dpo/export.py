"""python -m fitness_dpo.export: turn a run into a model that other programs load, and check that it answers as the run."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fitness_dpo import gguf_export, runs
from fitness_dpo.cli import verb
from fitness_dpo.config import ExportConfig, InputError, TrainConfig
from fitness_dpo.folder import new_folder, require_own, require_room
from fitness_dpo.llama import LlamaAnswerer, apart
from fitness_dpo.weights import locate

PARITY_UNCHECKED = "parity    not checked: llama-cpp-python is not installed; build it with make llama"


def main(config: ExportConfig, _: Path) -> None:
    run = runs.finished_run(config.run)
    trained = runs.load_config(run, TrainConfig)
    if config.base is not None:
        trained = replace(trained, model=replace(trained.model, name=config.base, revision=None))
    folder = Path(config.output) if config.output else run / "export" / kind(config)
    require_own(folder, mark(config, run))
    if config.format in ("gguf", "ollama"):
        gguf_export.converter(config.llama_cpp)
        if config.quantization == "q4_k_m":
            gguf_export.require_built("quantization=q4_k_m")
        if config.parity.required:
            gguf_export.require_built("parity.required=true")
    if config.format == "hub":
        from fitness_dpo.hub import require_open

        require_open(config.hub)
    locate(trained.model.name, trained.model.revision)
    export(config, trained, run, folder, Console())


def export(config: ExportConfig, trained: TrainConfig, run: Path, folder: Path, console: Console) -> None:
    """Write `folder` and print how it answers beside the run. Raises InputError, leaving nothing, where it differs too much."""
    from fitness_dpo import merge, parity
    from fitness_dpo.model_card import model_card

    name = model_name(trained.model.name)
    policy = merge.load_exact(run, trained.model)
    console.print(f"run       {run}\nbase      {trained.model.name}", highlight=False)
    if trained.model.load_in_4bit:
        console.print(
            "note      trained over 4-bit weights; exported, and compared, over the 16-bit ones", highlight=False
        )
    require_room(folder, needed_bytes(config, policy))
    adapter = parity.TorchAnswerer(policy, trained.data.system_prompt, standardised=trained.data.standardise)
    reference = parity.answers(adapter, config.parity)
    with policy.model.disable_adapter():
        differences = [parity.compare("untuned base", adapter, reference, None, config.parity.kept)]
    system = merge.system_prompt(trained)
    with new_folder(folder, mark(config, run)) as beside, apart() as child:
        if config.format in ("merged", "hub"):
            merge.write_merged(policy, system, config.dtype, beside)
            exported: parity.Answerer | None = parity.load_merged(beside)
        else:
            file = beside / f"{name}.{config.quantization}.gguf"
            write_llama(config, trained, policy, system, file)
            longest = max(len(row.prompt_ids) + len(row.answer_ids) for row in reference)
            exported = LlamaAnswerer(file, longest, child) if gguf_export.is_built() else None
        if exported is not None:
            allowed = getattr(config.parity.thresholds, config.stored)
            title = f"{config.format}, {config.stored}"
            differences.append(parity.compare(title, exported, reference, allowed, config.parity.kept))
        console.print(parity.table(differences))
        if breach := differences[-1].breach():
            raise InputError(f"format={config.format}: {breach}; nothing was written")
        if exported is None:
            console.print(PARITY_UNCHECKED, highlight=False)
        lines = [row.line() for row in differences] if differences[1:] else []
        card = model_card(name, run, trained, trained.model.name, config.license, lines)
        (beside / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.print(f"written   {folder} ({size / 1e6:,.1f} MB)", highlight=False)
    if config.format == "hub":
        from fitness_dpo.hub import upload

        console.print(f"uploaded  {upload(folder, config.hub)}", highlight=False)


def write_llama(config: ExportConfig, trained: TrainConfig, policy: Any, system: str | None, file: Path) -> None:
    """Write the GGUF file, and for Ollama the Modelfile beside it."""
    from transformers import AutoTokenizer

    from fitness_dpo.inference import end_tokens
    from fitness_dpo.merge import write_merged
    from fitness_dpo.ollama import modelfile

    ends = policy.tokenizer.convert_ids_to_tokens(end_tokens(policy))
    merged = file.parent / "merged"
    write_merged(policy, system, "float16", merged)  # rounds less than bfloat16, and is what the file stores
    script = gguf_export.converter(config.llama_cpp)
    gguf_export.write_gguf(merged, config.quantization, script, model_name(trained.model.name), file)
    if config.format == "ollama":
        text = modelfile(AutoTokenizer.from_pretrained(merged), file, ends, trained.model.max_length_tokens)
        (file.parent / "Modelfile").write_text(text, encoding="utf-8")
    shutil.rmtree(merged)


def kind(config: ExportConfig) -> str:
    """The name of the folder of this kind of export."""
    return f"{config.format}-{config.quantization}" if config.format in ("gguf", "ollama") else config.format


def mark(config: ExportConfig, run: Path) -> dict[str, str | None]:
    return {"run_id": runs.run_id(run), "format": config.format, "weights": config.stored}


def model_name(base: str) -> str:
    """A file name for the tuned model: its base's last part, of plain characters only."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/:]", base.rstrip("/"))[-1]).strip(".-")
    return f"{plain or 'model'}-dpo"


def needed_bytes(config: ExportConfig, policy: Any) -> int:
    """The most that is on the disk at once while the export is written."""
    from fitness_dpo.merge import BESIDE_WEIGHTS_BYTES, weights_bytes

    if config.format in ("merged", "hub"):
        return weights_bytes(policy, config.dtype) + BESIDE_WEIGHTS_BYTES
    whole = weights_bytes(policy, "float16")
    steps = 2 if config.quantization == "q4_k_m" else 1
    return int(whole * (steps + gguf_export.BITS_A_WEIGHT[config.quantization] / 16)) + BESIDE_WEIGHTS_BYTES


if __name__ == "__main__":
    verb("export", ExportConfig, main)
