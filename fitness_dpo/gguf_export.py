"""A merged model -> a GGUF file, through llama.cpp's own converter and quantizer. Imports no torch."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from fitness_dpo.config import InputError
from fitness_dpo.llama import apart, quiet_llama

CONVERTER = "convert_hf_to_gguf.py"
BITS_A_WEIGHT = {"f16": 16.0, "q8_0": 8.5, "q4_k_m": 8.5}
"""At most: a tensor whose width is no multiple of 256 can't be stored in 4 bits, and takes up to 8.5."""


def converter(folder: str | None) -> Path:
    """llama.cpp's converter. Raises InputError where it is not installed."""
    home = Path(folder).expanduser() if folder else Path(sys.prefix) / "share" / "llama.cpp"
    if not (home / CONVERTER).is_file():
        raise InputError(
            f"llama_cpp={home}: no {CONVERTER} there; install it with make llama, or name a checkout of llama.cpp"
        )
    return home / CONVERTER


def is_built() -> bool:
    """Whether llama-cpp-python is here, which quantizes to 4 bits and answers from a GGUF file."""
    return importlib.util.find_spec("llama_cpp") is not None


def require_built(key: str) -> None:
    if not is_built():
        raise InputError(f"{key}: needs llama-cpp-python, which is not installed; build it with make llama")


def write_gguf(merged: Path, quantization: str, script: Path, name: str, file: Path) -> None:
    """Convert the merged model to `file`. Raises InputError for a model that llama.cpp does not know."""
    if quantization != "q4_k_m":
        convert(merged, quantization, script, name, file)
        return
    whole = file.with_suffix(".f16")
    convert(merged, "f16", script, name, whole)
    with apart() as child:
        if not child.call(quantize, whole, file):
            raise InputError("quantization=q4_k_m: llama.cpp cannot quantize this model; use q8_0 or f16")
    whole.unlink()


def convert(merged: Path, kind: str, script: Path, name: str, file: Path) -> None:
    command = [
        sys.executable,
        str(script),
        str(merged),
        "--outfile",
        str(file),
        "--outtype",
        kind,
        "--model-name",
        name,
    ]
    own = {"PYTHONSAFEPATH": "", "HF_HUB_OFFLINE": "1"}  # it imports what lies beside it
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | own)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise InputError(
            f"format=gguf: llama.cpp's converter cannot convert this model ({lines[-1].strip()}); use format=merged"
        )


def quantize(whole: Path, file: Path) -> bool:
    """Write Q4_K_M, 4 bits for most matrices and 6 for half of the value and down projections; whether it went well."""
    llama = quiet_llama()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M, len(os.sched_getaffinity(0))
    failed: int = llama.llama_model_quantize(os.fsencode(whole), os.fsencode(file), ctypes.byref(settings))
    return not failed
