"""Time DPO training by several systems on the same rows, in the same order, from the same weights.

    python scripts/benchmark.py --batches 8,32,96 --output benchmark.json       # one NVIDIA GPU, Qwen3-0.6B's shape
    python scripts/benchmark.py --device cpu --batches 4 --rows embedded        # the embedded model and its set

Each system runs in a process of its own. Qwen3-0.6B's shape has random weights: they say what a step costs and whether the
losses agree, nothing about answers. Synthetic rows have prompts of about 30 tokens, chosen answers of about 185 and
rejected ones of about 150, log-normal; `--rows embedded` takes the embedded set. Warm-up steps are timed apart.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PEER = ["dpo.forward=padded"]
LIVE = ["dpo.precompute_reference=false"]
SYSTEMS = {
    "TRL + PEFT": ["model.backend=transformers", *PEER, *LIVE],
    "Unsloth + TRL": ["model.backend=unsloth", *PEER, *LIVE],
    "Unsloth + TRL, cached reference": ["model.backend=unsloth", *PEER],
    "cached reference": ["model.backend=transformers", *PEER],
    "packed, live reference": ["model.backend=transformers", "dpo.forward=packed", "dpo.compile=false", *LIVE],
    "packed": ["model.backend=transformers", "dpo.forward=packed", "dpo.compile=false"],
    "packed, compiled": ["model.backend=transformers", "dpo.forward=packed", "dpo.compile=true"],
    "packed, compiled, Unsloth backend": ["model.backend=unsloth", "dpo.forward=packed", "dpo.compile=true"],
}
"""Name -> overrides. Names that speak of TRL are peers: TRL's trainer as it is, the reference at each step or cached by TRL."""


def synthetic_rows(count: int, vocabulary: int, scale: float, seed: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)  # noqa: S311

    def ids(mean: float, sigma: float) -> list[int]:
        length = max(4, round(scale * draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))
        return [draw.randrange(10, vocabulary) for _ in range(length)]

    return [
        {"prompt_ids": ids(30, 0.4), "chosen_ids": ids(185, 0.3), "rejected_ids": ids(150, 0.3)} for _ in range(count)
    ]


def embedded_rows(config: Any, tokenizer: Any) -> list[dict[str, list[int]]]:
    from fitness_dpo.data import load_preferences
    from fitness_dpo.template import ChatTemplate
    from fitness_dpo.trainer import tokenize

    rows = load_preferences(config.data).splits["train"]
    return list(tokenize(rows, ChatTemplate(tokenizer), config.model.max_length_tokens).rows)


def child(options: argparse.Namespace) -> None:
    """Train by one system and print one line of JSON."""
    started = time.perf_counter()
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from fitness_dpo import config as settings

    settings.register()
    OmegaConf.register_new_resolver("default_model", lambda: "smollm2_135m", replace=True)
    overrides = [
        "model=smollm2_135m", f"model.name={options.model}", f"dpo.batch_size={options.batch}", f"dpo.eval_batch_size={options.batch}",
        "dpo.gradient_accumulation_steps=1", "dpo.save_steps=100000", f"dpo.max_steps={options.steps}",
        "model.max_length_tokens=8192", "dpo.warmup_ratio=0", f"dpo.learning_rate={options.learning_rate}", "logging.wandb.mode=disabled",
        f"model.gradient_checkpointing='{options.checkpointing}'", f"model.load_in_4bit={str(options.load_in_4bit).lower()}", f"model.dtype={options.dtype}",
        *SYSTEMS[options.system], *options.set,
    ]  # fmt: skip
    if "transformers" in SYSTEMS[options.system][0] and options.checkpointing == "unsloth":
        overrides.append("model.gradient_checkpointing='true'")
    with initialize_config_module("fitness_dpo.conf", version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("config", overrides=overrides))

    from fitness_dpo.model import compute_dtype, load_policy

    policy = load_policy(config.model, config.lora, config.dpo.seed)

    import datasets
    import torch
    import trl
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    from fitness_dpo.logprobs import fill_trl_slot
    from fitness_dpo.preference_trainer import PreferenceTrainer
    from fitness_dpo.trainer import dpo_arguments

    if not torch.cuda.is_available() and config.model.backend == "transformers":
        fill_trl_slot()
    generator = torch.Generator().manual_seed(options.seed)  # the same first weights, whatever built the adapter
    for name, parameter in sorted(policy.model.named_parameters()):
        if "lora_A" in name:
            fresh = (torch.rand(parameter.shape, generator=generator) * 2 - 1) / math.sqrt(parameter.size(1))
            parameter.data.copy_(fresh)
    count = min(options.batch * options.steps, 100_000)
    rows = embedded_rows(config, policy.tokenizer) if options.rows == "embedded" else synthetic_rows(
        count, min(policy.model.config.vocab_size, 49_000), options.scale
    )  # fmt: skip
    rows = (rows * (count // len(rows) + 1))[:count]
    gpu = torch.cuda.is_available()

    def settle() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        """Waits for the GPU before and after what is measured only: a step may be prepared while the last one computes."""

        ends: list[float] = []  # noqa: RUF012

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(settle())

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            edge = state.global_step in (1, options.warmup, options.steps)
            self.ends.append(settle() if edge else time.perf_counter())
            if state.global_step == options.warmup and options.strict:
                torch.compiler.set_stance("fail_on_recompile")

    class Steps:
        """Keeps each step's loss without asking the GPU for it."""

        losses: list[torch.Tensor] = []  # noqa: RUF012

        def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*given, **named)  # type: ignore[misc]
            self.losses.append(loss.detach())
            return loss

    class Ours(Steps, PreferenceTrainer):
        pass

    class Peer(Steps, trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    packed = "dpo.forward=packed" in SYSTEMS[options.system]
    dtype = compute_dtype(config.model.dtype)
    arguments = dpo_arguments(config, Path(tempfile.mkdtemp()), dtype, validate=False)
    arguments |= {"train_sampling_strategy": "sequential", "disable_tqdm": True}
    given: dict[str, Any] = {
        "model": policy.model, "train_dataset": datasets.Dataset.from_list(rows), "processing_class": policy.tokenizer,
        "callbacks": [Clock()],
    }  # fmt: skip
    reference_began = settle()
    if "TRL" in options.system:
        arguments |= {
            "precompute_ref_log_probs": config.dpo.precompute_reference,
            "precompute_ref_batch_size": options.batch,
        }
        trainer = Peer(args=trl.DPOConfig(**arguments), **given)
    else:
        trainer = Ours(config, packed=packed, args=trl.DPOConfig(**arguments), **given)
    reference_seconds = settle() - reference_began
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    if options.profile:
        profile(trainer, options)
    trainer.train()
    steps = [after - before for before, after in zip(Clock.ends, Clock.ends[1:], strict=False)]
    measured = steps[options.warmup :]
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    typical = statistics.median(measured)
    print(json.dumps({
        "dtype": str(dtype).removeprefix("torch."), "checkpointing": config.model.gradient_checkpointing, "pairs_per_second": options.batch / typical, "pairs_per_second_mean": options.batch * len(measured) / sum(measured),
        "tokens_per_second": tokens / len(rows) * options.batch / typical, "step_seconds": steps,
        "peak_gib": (torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else None,
        "reference_seconds": reference_seconds, "first_step_seconds": Clock.ends[1] - started,
        "loss": torch.stack(Steps.losses).tolist(),
    }))  # fmt: skip


def profile(trainer: Any, options: argparse.Namespace) -> None:
    """Print where a step's time goes after the warm-up: by kernel, then, three steps on, by Python function."""
    import cProfile
    import pstats

    import torch
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        functions = cProfile.Profile()

        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == options.warmup:
                self.profiler = torch.profiler.profile()
                self.profiler.start()
            if state.global_step == options.warmup + 3:
                self.functions.enable()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == options.warmup + 2:
                self.profiler.stop()
                by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
                print(
                    self.profiler.key_averages().table(sort_by=by, row_limit=45, max_name_column_width=80),
                    file=sys.stderr,
                )
            if state.global_step == options.warmup + 6:
                self.functions.disable()
                pstats.Stats(self.functions, stream=sys.stderr).sort_stats("tottime").print_stats(30)

    trainer.add_callback(Profile())


def qwen3_shape(folder: Path, tokenizer: str) -> Path:
    from gpu_check import write_qwen3_shape

    return write_qwen3_shape(folder, tokenizer)


def matrix_rate() -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 product in bfloat16 on random numbers."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        left @ right
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--systems", default="", help="only these, numbers in the list printed first, such as 0,1,6")
    parser.add_argument("--batches", default="8,32", help="pairs a step")
    parser.add_argument("--rows", choices=("synthetic", "embedded"), default="synthetic")
    parser.add_argument("--scale", type=float, default=1.0, help="times the lengths of the synthetic rows")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the first LoRA weights")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--dtype", choices=("auto", "float32"), default="auto", help="auto: bfloat16 where the device has it"
    )
    parser.add_argument("--checkpointing", choices=("false", "true", "unsloth"), default="false")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides, such as dpo.micro_batch_tokens=1700")
    parser.add_argument(
        "--model", default="", help="a folder; by default Qwen3-0.6B's shape, on a CPU the embedded model"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--strict", action="store_true", help="fail where anything compiles anew after the warm-up")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--system", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.system:
        child(options)
        return
    names = [list(SYSTEMS)[int(number)] for number in options.systems.split(",")] if options.systems else list(SYSTEMS)
    for number, name in enumerate(SYSTEMS):
        print(number, name)
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
    results: list[dict[str, Any]] = json.loads(options.output.read_text()) if options.output.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        environment["FITNESS_DPO_CACHE"] = str(Path(folder) / "cache")
        default = "embedded:smollm2-135m-instruct" if options.device == "cpu" else ""
        model = (
            options.model
            or default
            or str(
                qwen3_shape(Path(folder) / "qwen3", "smollm2-135m-instruct" if options.rows == "embedded" else "tiny")
            )
        )
        for batch in map(int, options.batches.split(",")):
            for name in names:
                command = [
                    sys.executable, __file__, "--system", name, "--batch", str(batch), "--model", model, "--rows", options.rows,
                    "--scale", str(options.scale), "--seed", str(options.seed), "--learning-rate", str(options.learning_rate), "--steps", str(options.steps), "--warmup", str(options.warmup),
                    "--dtype", options.dtype, "--checkpointing", options.checkpointing, *(["--load-in-4bit"] if options.load_in_4bit else []),
                    *(["--strict"] if options.strict else []), *(["--profile"] if options.profile else []),
                    "--set", *options.set,
                ]  # fmt: skip
                shutil.rmtree(Path(folder) / "cache" / "reference", ignore_errors=True)
                began = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
                result: dict[str, Any] = {
                    "system": name, "batch": batch, "rows": options.rows, "scale": options.scale, "seed": options.seed, "device": options.device,
                    "4bit": options.load_in_4bit, "set": options.set, "wall_seconds": time.perf_counter() - began,
                }  # fmt: skip
                if done.returncode:
                    lines = done.stderr.strip().splitlines()
                    out_of_memory = any("out of memory" in line.lower() for line in lines)
                    result["failed"] = "out of memory" if out_of_memory else "\n".join(lines[-12:])
                else:
                    result |= json.loads(done.stdout.strip().splitlines()[-1])
                if options.profile:
                    print(done.stderr[-24000:])
                results.append(result)
                options.output.write_text(json.dumps(results))
                print(line(result), flush=True)


def line(result: dict[str, Any]) -> str:
    head = f"{result['system']:36} batch {result['batch']:4}"
    if "failed" in result:
        return f"{head}  {result['failed']}"
    held = f" ({result['reserved_gib']:.2f} held)" if result["reserved_gib"] else ""
    return (
        f"{head}  {result['pairs_per_second']:7.2f} pairs/s  {result['tokens_per_second']:8.0f} tokens/s  {result['peak_gib']:6.2f} GiB{held}  "
        f"reference {result['reference_seconds']:6.1f} s  first step {result['first_step_seconds']:6.1f} s  "
        f"loss {result['loss'][0]:.4f} to {result['loss'][-1]:.4f}"
    )


if __name__ == "__main__":
    main()
