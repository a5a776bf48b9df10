"""Shared pieces: every test is offline, and runs that train write under a temporary folder."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when Triton is imported
os.environ.pop("WANDB_API_KEY", None)

from fitness_dpo import config as settings
from fitness_dpo.config import TrainConfig
from fitness_dpo.model import Policy

ROOT = Path(__file__).parents[1]
CHROMIUM = Path("/usr/bin/chromium")
PAIRS = [
    {
        "question": f"How many sets of squats should I do in week {week}?",
        "chosen": f"Do {week + 2} hard sets, and stop one rep short of failure.",
        "rejected": f"Do {week * 10} sets each day until you can no longer walk.",
    }
    for week in range(1, 17)
]
TINY = [
    "model=tiny",
    "data.validation_size=4",
    "data.test_size=2",
    "logging.sampling.max_new_tokens=8",
    "dpo.max_steps=2",
]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.json"
    file.write_text(json.dumps(PAIRS), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def compose_train() -> Callable[..., TrainConfig]:
    """The TrainConfig that `python -m fitness_dpo.train *overrides` builds on a machine without a GPU."""
    settings.register()
    OmegaConf.register_new_resolver("default_model", lambda: "smollm2_135m", replace=True)

    def build(*overrides: str) -> TrainConfig:
        with initialize_config_module("fitness_dpo.conf", version_base="1.3"):
            built = OmegaConf.to_object(compose("config", overrides=list(overrides)))
        assert isinstance(built, TrainConfig)
        return built

    return build


@pytest.fixture(scope="session")
def tiny(compose_train: Callable[..., TrainConfig]) -> Callable[..., tuple[TrainConfig, Policy]]:
    """A config on the tiny model and a fresh policy for it."""
    from fitness_dpo.model import load_policy

    def build(*overrides: str) -> tuple[TrainConfig, Policy]:
        config = compose_train(*TINY, "logging.wandb.mode=disabled", *overrides)
        return config, load_policy(config.model, config.lora, config.dpo.seed)

    return build


def run_verb(
    verb: str, *arguments: str, cwd: Path, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m fitness_dpo.VERB arguments` in `cwd`, offline and without a GPU."""
    return subprocess.run(
        [sys.executable, "-m", f"fitness_dpo.{verb}", *arguments],
        cwd=cwd, input=stdin, capture_output=True, text=True, check=False, timeout=400,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
    )  # fmt: skip


@contextmanager
def served(verb: str, *arguments: str) -> Iterator[str]:
    """The address at which `python -m fitness_dpo.VERB arguments` answers, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", f"fitness_dpo.{verb}", f"port={port}", *arguments]
    with subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}) as process:
        try:
            while True:
                assert process.poll() is None, f"{verb} did not start"
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    """The folder of a finished two-step run of the tiny model, its wandb run offline."""
    home = tmp_path_factory.mktemp("trained")
    done = run_verb("train", *TINY, f"data.path={pairs_file}", "dpo.logging_steps=1", cwd=home)
    assert done.returncode == 0, done.stderr
    (run,) = (home / "outputs").glob("*/*")
    return run


@pytest.fixture(scope="session")
def talker(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model that says printable characters only, the untuned one others than the tuned one."""
    import numpy
    from safetensors.numpy import load_file, save_file

    from fitness_dpo.weights import locate

    home = tmp_path_factory.mktemp("talker")
    model, run = home / "model", home / "outputs" / "2026-01-01" / "00-00-00"
    shutil.copytree(locate("embedded:tiny", None), model)
    weights = load_file(model / "model.safetensors")
    vocabulary = read_json(model / "tokenizer.json")["model"]["vocab"]
    silent = [token for text, token in vocabulary.items() if not (len(text) == 1 and "!" <= text <= "~")]
    weights["model.embed_tokens.weight"][silent] = 0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("embedded:tiny", str(model)))
    adapter, draw = load_file(run / "adapter" / "adapter_model.safetensors"), numpy.random.default_rng(0)
    for name in sorted(adapter):
        if "lora_B" in name:
            adapter[name] = draw.normal(scale=0.3, size=adapter[name].shape).astype("float32")
    save_file(adapter, run / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    return run


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs at `folder`. Skips where this user may not mount, and only there: without root the tests run in
    `unshare --user --map-root-user --mount`."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
        capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    if re.search("must be superuser|permission denied", done.stderr):
        pytest.skip(
            f"mounting a small disk: {done.stderr.splitlines()[0]}; run it in unshare --user --map-root-user --mount"
        )
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "size=4m"):
        yield disk


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, for the tests of a page."""
    from playwright.sync_api import sync_playwright

    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
