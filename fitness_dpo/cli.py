"""Runs a verb under Hydra and turns a user's mistake into one line. Imports no torch."""

import contextlib
import dataclasses
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fitness_dpo import config, distributed, runs, sweep
from fitness_dpo.gpus import gpu_count
from fitness_dpo.interruption import Stopped

RESOLVING = "InputError raised while resolving interpolation: "
OUT_OF_MEMORY = "out of memory on the GPU: lower batch_size or model.max_length_tokens, set model.load_in_4bit=true, or free the GPU"
TEXT_KEYS = ("prompt", "system_prompt", "data.system_prompt")


def default_model() -> str:
    return "qwen3_0.6b" if gpu_count() else "smollm2_135m"


def setting_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config dataclass, groups included."""
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        for kind in (field.type, *get_args(field.type)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield from setting_keys(kind, f"{prefix}{field.name}.")


def quote_text(argument: str) -> str:
    """A text setting's override with its value quoted for Hydra, whose grammar gives a meaning to , ' ( and others."""
    key, _, value = argument.partition("=")
    quoted = value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1
    if key not in TEXT_KEYS or quoted or value == "null":
        return argument
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'


def check_override_keys(arguments: list[str], schema: type) -> None:
    """Raise ValueError with the nearest key for an override that names no setting."""
    known = set(setting_keys(schema))
    for override in OverridesParser.create().parse_overrides(overrides=arguments):
        key = override.key_or_group
        if key.split(".")[0] in ("hydra", "experiment", "sampling") or key.startswith("hydra/") or "/" in key:
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]}?" if near else "see --help for the settings"
            raise config.InputError(f"{override.input_line}: there is no setting '{key}'; {mend}")


def one_line(error: Exception) -> str:
    """The error as a single line that names the key, the value and the mend."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        options = [option for option in error.options if option != "__init__"]
        near = difflib.get_close_matches(choice, options, n=1)
        mend = f"did you mean {group}={near[0]}?" if near else f"choose one of {', '.join(options)}"
        return f"{group}={choice}: there is no such choice; {mend}"
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return f"{str(error).splitlines()[0]}: {one_line(error.__cause__)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OmegaConfBaseException):
        lines = [line for line in lines if not re.match(r"(full_key|object_type|reference_type)[:=]", line)]
        if lines[0].startswith(RESOLVING):
            return lines[0].removeprefix(RESOLVING)
        if error.full_key:
            lines.insert(0, f"{error.full_key}:")
    return " ".join(lines)


def verb(config_name: str, schema: type, run: Callable[[Any, Path], int | None]) -> None:
    """Compose conf/`config_name`.yaml with the command line, build `schema` from it and call
    `run(config, run_folder)`, whose result, if it gives one, is the exit status.

    A mistake in the input ends with exit status 2 and one line on stderr, nothing else. FITNESS_DPO_TRACEBACK=1 shows
    where it was raised.
    """
    for library, level in (("TRANSFORMERS", "error"), ("HF_HUB", "error"), ("DATASETS", "critical")):
        os.environ.setdefault(f"{library}_VERBOSITY", level)  # their warnings speak to programmers
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    config.register()
    OmegaConf.register_new_resolver("default_model", default_model, replace=True)
    OmegaConf.register_new_resolver(
        "run_dir", lambda resume: str(runs.run_folder(resume)), replace=True, use_cache=True
    )
    OmegaConf.register_new_resolver(
        "new_folder", lambda parent: str(runs.new_folder(Path(parent))), replace=True, use_cache=True
    )
    OmegaConf.register_new_resolver(
        "sweep_dir", lambda resume: str(sweep.folder_to_fill(resume)), replace=True, use_cache=True
    )

    sys.argv[1:] = map(quote_text, sys.argv[1:])
    mistakes: list[Exception] = []
    status = 0

    def task(composed: DictConfig) -> None:
        nonlocal status
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            OmegaConf.resolve(composed)
            status = run(OmegaConf.to_object(composed), folder) or 0
        except (config.InputError, OmegaConfBaseException) as error:
            mistakes.append(error)
            status = getattr(error, "status", 2)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported here
                raise
            mistakes.append(config.Fault(OUT_OF_MEMORY))
            status = 2
        finally:
            if runs.OUTPUTS.resolve() in folder.resolve().parents:
                with contextlib.suppress(OSError):  # leave no empty run folder behind; one that holds something stays
                    while folder.resolve() != runs.OUTPUTS.resolve():
                        folder.rmdir()
                        folder = folder.parent

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the except clause below instead of Hydra's own printer
    try:
        check_override_keys(get_args_parser().parse_args().overrides, schema)
        hydra.main(version_base="1.3", config_path="pkg://fitness_dpo.conf", config_name=config_name)(task)()
    except (config.InputError, HydraException, OmegaConfBaseException) as error:
        mistakes.append(error)
        status = 2
    except KeyboardInterrupt as stopped:
        sys.exit(stopped.status if isinstance(stopped, Stopped) else 130)
    for mistake in mistakes:
        if distributed.rank() == 0 or isinstance(mistake, config.Fault):
            print(f"error: {one_line(mistake)}", file=sys.stderr)  # noqa: T201
    if mistakes and os.environ.get("FITNESS_DPO_TRACEBACK") == "1":
        raise mistakes[0]
    sys.exit(status)
