"""Train on the GPU at hand for a few steps each way and print what it took: the table of docs/gpu.md.

    python scripts/gpu_check.py --steps 20 --output gpu.json

SmolLM2-135M is the real model. Qwen3-0.6B's rows have its exact shape with random weights, which says what a step costs
and nothing about quality, so that it runs where no model hub can be reached.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from fitness_dpo.weights import locate

RUNS = {
    "SmolLM2-135M, bf16": ["model=smollm2_135m"],
    "Qwen3-0.6B shape, bf16": ["experiment=h100", "dpo.batch_size=8"],
    "Qwen3-0.6B shape, bf16, 32 pairs": ["experiment=h100"],
    "Qwen3-0.6B shape, 4-bit, checkpointing": ["model=qwen3_0.6b", "dpo.batch_size=8", "dpo.gradient_accumulation_steps=1"],
    "Qwen3-0.6B shape, T4 recipe (fp16, 4-bit)": ["experiment=kaggle_t4"],
    "Qwen3-0.6B shape, bf16, transformers backend": [
        "experiment=h100", "dpo.batch_size=8", "model.backend=transformers"],
}  # fmt: skip


def write_qwen3_shape(folder: Path, tokenizer_of: str = "smollm2-135m-instruct") -> Path:
    """A Qwen3-0.6B of random weights (596 M parameters), with the tokenizer of an embedded model, which uses few of its 151,936 rows."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(locate(f"embedded:{tokenizer_of}", None))
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype=torch.bfloat16,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(overrides: list[str], steps: int, work: Path) -> dict[str, Any]:
    started = time.perf_counter()
    command = [
        sys.executable, "-m", "fitness_dpo.train", *overrides, f"dpo.max_steps={steps}", "dpo.logging_steps=1",
        "logging.wandb.mode=disabled", "logging.sample_steps=null", "data.max_validation_rows=32",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    print(done.stdout[-1500:], done.stderr[-3000:] if done.returncode else "", flush=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    metrics = json.loads(max(work.glob("outputs/*/*/metrics.json"), key=lambda file: file.stat().st_mtime).read_text())
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    return {
        "command": " ".join(["python", *command[1:]]),
        "loss": [losses[0], losses[-1]],
        "held_out_accuracy": (metrics["after"] or {}).get("eval_rewards/accuracies"),
        "wall_seconds": round(time.perf_counter() - started, 1),
        **{key: metrics[key] for key in ("pairs_per_second", "tokens_per_second", "peak_memory_gib", "seconds")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", default="", help="only the rows whose name holds this")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = write_qwen3_shape(Path(folder) / "qwen3-0.6b-shape")
        for name, overrides in RUNS.items():
            if options.only not in name:
                continue
            print(f"== {name}", flush=True)
            model = [] if name.startswith("SmolLM2") else [f"model.name={shape}"]
            results[name] = train([*overrides, *model], options.steps, Path(folder))
            options.output.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "runs": results}, indent=1))
    for name, result in results.items():
        if "failed" in result:
            print(f"| {name} | {result['failed']} |")
        else:
            first, last = result["loss"]
            print(
                f"| {name} | {result['pairs_per_second']} | {result['tokens_per_second']} | {result['peak_memory_gib']} "
                f"| {first:.3f} to {last:.3f} |"
            )


if __name__ == "__main__":
    main()
