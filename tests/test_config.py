"""Composing a config: every YAML works, a typo fails with the near match, and torch is never imported for it."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames
from trl import DPOConfig

from fitness_dpo.cli import setting_keys
from fitness_dpo.config import TrainConfig
from fitness_dpo.config.dpo import LOSS_TYPES, OPTIMIZERS, SCHEDULERS, SMOOTHED_LOSSES
from fitness_dpo.trainer import dpo_arguments
from tests.conftest import ROOT, run_verb

CHOICES = [
    f"{file.parent.name}={file.stem}"
    for file in sorted((ROOT / "conf").glob("*/*.yaml"))
    if file.parent.name != "sampling"
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_fits_dpo_config(choice: str, compose_train: Callable[..., TrainConfig]) -> None:
    arguments = dpo_arguments(compose_train(choice), Path("run"), torch.float32, validate=True)
    inspect.signature(DPOConfig).bind(**arguments)


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_every_loss_of_trl_is_a_choice(loss: str, compose_train: Callable[..., TrainConfig], tmp_path: Path) -> None:
    smoothing = 0.01 if loss in SMOOTHED_LOSSES else 0
    config = compose_train(
        f"dpo.loss_type=[{loss},sft]", "dpo.loss_weights=[1.0,0.2]", f"dpo.label_smoothing={smoothing}"
    )
    arguments = DPOConfig(**dpo_arguments(config, tmp_path, torch.float32, validate=False) | {"report_to": []})
    assert (arguments.loss_type, arguments.loss_weights) == ([loss, "sft"], [1.0, 0.2])


def test_every_scheduler_and_optimizer_is_one_of_transformers() -> None:
    assert set(SCHEDULERS) <= {kind.value for kind in SchedulerType}
    assert set(OPTIMIZERS) <= {kind.value for kind in OptimizerNames}


def test_every_setting_has_a_default_in_conf(compose_train: Callable[..., TrainConfig]) -> None:
    """A dataclass field without a value in conf/ would make to_object fail, so composing is the check; count them."""
    assert "dpo.beta" in set(setting_keys(TrainConfig))
    assert compose_train().dpo.beta == 0.1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dpo.bata=1", "there is no setting 'dpo.bata'; did you mean dpo.beta?"),
        ("+dpo.bata=1", "there is no setting 'dpo.bata'; did you mean dpo.beta?"),
        ("model=smollm", "did you mean model=smollm2_135m?"),
        ("experiment=quickstrat", "did you mean experiment=quickstart?"),
        ("dpo.beta=high", "dpo.beta: Value 'high' of type 'str' could not be converted to Float"),
        ("dpo.beta=0", "dpo.beta=0.0: use more than 0"),
        ("lora.r=0", "lora.r=0: use 1 or more"),
        ("dpo.learning_rate=-1e-5", "dpo.learning_rate=-1e-05: use more than 0"),
        ("lora.target_modules=[]", "lora.target_modules=[]: name at least one linear layer"),
        ("dpo.loss_type=[sigmod]", "dpo.loss_type=sigmod: choose one of sigmoid"),
        ("model.dtype=float8", "model.dtype=float8: choose one of auto, bfloat16"),
        ("dpo.lr_scheduler=cosin", "dpo.lr_scheduler=cosin: choose one of linear, cosine"),
        ("dpo.label_smoothing=0.1", "only robust, exo_pair, aot, aot_unpaired use it; set it to 0"),
        ("data.path=[]", "data.path=[]: name a file"),
    ],
)
def test_a_mistake_ends_in_one_line(override: str, expected: str, tmp_path: Path) -> None:
    done = run_verb("train", override, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.*")), "nothing may be left behind"


def test_help_and_composing_import_no_torch(tmp_path: Path) -> None:
    check = (
        "import sys; from fitness_dpo.cli import verb; from fitness_dpo.config import TrainConfig\n"
        "sys.argv = ['train', *sys.argv[1:]]\n"
        "try: verb('config', TrainConfig, lambda config, run: None)\n"
        "finally: assert not {'torch', 'transformers', 'datasets', 'wandb'} & set(sys.modules), 'imported'"
    )
    for flag in ("--help", "lora.r=32"):
        done = subprocess.run(
            [sys.executable, "-c", check, flag], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "dpo.beta=0.1" in done.stdout or flag != "--help"
