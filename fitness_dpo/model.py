"""Settings -> a model ready to train or to answer. Unsloth, where asked for, is imported before transformers, as it must be."""

import ctypes
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fitness_dpo import runs
from fitness_dpo.config import InputError, LoraConfig, ModelConfig, ModelOverrides
from fitness_dpo.weights import cache_folder, locate

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h."""
CPU_FLAGS_OF_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


class Policy(NamedTuple):
    model: Any
    """A transformers or PEFT causal language model."""
    tokenizer: Any
    start: Path | None = None
    """Where the fresh adapter was kept, when it does not start at zero (PiSSA, OLoRA)."""


def load_policy(config: ModelConfig, lora: LoraConfig, seed: int) -> Policy:
    """The model of `config` with a fresh LoRA adapter, for training. Raises InputError where it cannot be built here."""
    path = locate(config.name, config.revision)
    build = _unsloth_policy if config.backend == "unsloth" else _transformers_policy
    policy = build(config, path, lora, seed)
    if config.load_in_4bit and not getattr(policy.model, "is_loaded_in_4bit", False):
        raise _no_4bit("this model's layers cannot be quantized on this machine")
    if policy.tokenizer.pad_token is None:
        policy.tokenizer.pad_token = policy.tokenizer.eos_token
    policy.tokenizer.padding_side = "left"
    return policy._replace(start=keep_start(policy.model)) if lora.init in ("pissa", "olora") else policy


def keep_start(model: Any) -> Path:
    """Save the fresh adapter, which PEFT wants back when the trained one is saved.

    The base is split once: from here on the adapter's config says so, or TRL's reference adapter, a copy of it, would
    split the rest again.
    """
    folder = Path(tempfile.mkdtemp(prefix="fitness_dpo_start_"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(folder))
    return folder


def load_trained(run: Path, config: ModelConfig) -> Policy:
    """The base model of a run with the run's adapter, for answering. `config` is the run's own or an override of it."""
    from peft import PeftModel

    adapter = run / runs.ADAPTER
    if not (adapter / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{adapter}: no adapter_model.safetensors there; the run did not finish, go on with resume={run}"
        )
    known = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    policy = load_base(config)
    try:
        model = PeftModel.from_pretrained(policy.model, str(adapter))
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise InputError(
            f"{adapter}: made for {known}, which is not the shape of model.name={config.name}; train again"
        ) from error
    return Policy(model.eval(), policy.tokenizer)


def save_adapter(policy: Policy, base_name: str, folder: Path) -> None:
    """Write the trained adapter, its tokenizer and chat template, whole or not at all.

    PiSSA and OLoRA move weight from the base into the fresh adapter; the difference to that start is saved, a plain LoRA
    of rank 2r over the untouched base (PEFT's conversion).
    """
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    start = {"path_initial_model_for_weight_conversion": str(policy.start)} if policy.start else {}
    policy.model.save_pretrained(str(beside), selected_adapters=["default"], **start)
    settings = beside / "adapter_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_name}
    settings.write_text(json.dumps(known, indent=2), encoding="utf-8")
    policy.tokenizer.save_pretrained(str(beside))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def load_base(config: ModelConfig) -> Policy:
    """The model of `config` itself, without an adapter, for answering."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fitness_dpo.few_rows import attend_in_groups, quicken

    keep_freed_memory()
    path = locate(config.name, config.revision)
    shared: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(path, **shared)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=compute_dtype(config.dtype),
        device_map={"": device()},
        quantization_config=_quantization(config),
        use_safetensors=True,
        **shared,
    )
    quicken(model)
    attend_in_groups(model)
    return Policy(model.eval(), tokenizer)


def override(config: ModelConfig, overrides: ModelOverrides) -> ModelConfig:
    """`config` with every setting that `overrides` gives."""
    given = {name: value for name in ModelOverrides.__slots__ if (value := getattr(overrides, name)) is not None}
    return replace(config, **given)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed. It gives them back otherwise, and the kernel clears every page of the next
    ones: a tenth of a training step on a CPU."""
    libc = ctypes.CDLL(None)
    if device() == "cpu" and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def compute_dtype(name: str) -> Any:
    """The torch dtype of the frozen weights and of the arithmetic."""
    import torch

    on_gpu = torch.cuda.is_available()
    if name == "float16" and not on_gpu:
        raise InputError("model.dtype=float16: a CPU computes it slowly and cannot train in it; use model.dtype=auto")
    if name != "auto":
        return getattr(torch, name)
    if on_gpu:
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    return torch.bfloat16 if CPU_FLAGS_OF_BFLOAT16 & _cpu_flags() else torch.float32


def _cpu_flags() -> set[str]:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    return set(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())


def _no_4bit(reason: str) -> InputError:
    return InputError(f"model.load_in_4bit=true: {reason}; set model.load_in_4bit=false")


def _require_4bit() -> None:
    """Raise InputError unless one 4-bit layer really runs here: bitsandbytes imports where its kernels do not work."""
    import torch

    try:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(
            device()
        )
        layer(torch.ones(1, 64, device=device()))
    except (ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise _no_4bit(f"bitsandbytes does not run here ({str(error).splitlines()[0]})") from error


def _quantization(config: ModelConfig) -> Any:
    """NF4 with double quantization (QLoRA, Dettmers et al. 2023, section 3), or None."""
    if not config.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    _require_4bit()
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(config.dtype),
    )  # fmt: skip


def _lora_arguments(lora: LoraConfig) -> dict[str, Any]:
    """What PEFT's LoraConfig and Unsloth's get_peft_model both take."""
    return {
        "r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": lora.bias,
        "target_modules": lora.target_modules, "use_rslora": lora.use_rslora, "use_dora": lora.use_dora,
        "init_lora_weights": True if lora.init == "default" else lora.init, "modules_to_save": lora.modules_to_save,
    }  # fmt: skip


def _transformers_policy(config: ModelConfig, path: str, lora: LoraConfig, seed: int) -> Policy:
    import peft
    from transformers import set_seed

    policy = load_base(config)
    set_seed(seed)
    try:
        model = peft.get_peft_model(policy.model, peft.LoraConfig(task_type="CAUSAL_LM", **_lora_arguments(lora)))
    except ValueError as error:
        raise _no_target(lora, error) from error
    return Policy(model, policy.tokenizer)


def _unsloth_policy(config: ModelConfig, path: str, lora: LoraConfig, seed: int) -> Policy:
    unsloth = import_unsloth()
    keep_freed_memory()
    if config.load_in_4bit:
        _require_4bit()
    checkpointing = {"unsloth": "unsloth", "true": True, "false": False}[config.gradient_checkpointing]
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        path, revision=config.revision, max_seq_length=config.max_length_tokens, dtype=compute_dtype(config.dtype),
        load_in_4bit=config.load_in_4bit, trust_remote_code=config.trust_remote_code,
        use_gradient_checkpointing=checkpointing, use_exact_model_name=True,  # quantize the model named, not a mirror of it
    )  # fmt: skip
    try:
        model = unsloth.FastLanguageModel.get_peft_model(
            model, random_state=seed, use_gradient_checkpointing=checkpointing, **_lora_arguments(lora)
        )
    except ValueError as error:
        raise _no_target(lora, error) from error
    return Policy(model, tokenizer)


def _no_target(lora: LoraConfig, error: ValueError) -> InputError:
    return InputError(
        f"lora.target_modules={lora.target_modules}: {str(error).splitlines()[0]}; name layers of this model, or all-linear"
    )


def import_unsloth() -> Any:
    """Import Unsloth with its generated code in a private folder of the cache and its usage statistics off."""
    folder = cache_folder() / "unsloth_compiled"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(folder))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault(
        "UNSLOTH_CPU_COMPILE", "0"
    )  # Inductor costs a minute at the first steps and gains nothing here
    import unsloth

    return unsloth
