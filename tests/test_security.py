"""Nothing executes that should not, and no secret leaves the environment."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fitness_dpo import runs
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.manifest import seal
from fitness_dpo.weights import locate
from tests.conftest import PAIRS, TINY, run_verb
from tests.preloaded import Trainings, preloaded

SECRETS = {"WANDB_API_KEY": "5ec7e7" * 6 + "abcd", "HF_TOKEN": "hf_notToBeSeenAnywhere"}  # pragma: allowlist secret
LOCAL_NAMES = (
    "yaml",
    "hydra",
    "omegaconf",
    "msgspec",
    "torch",
    "numpy",
    "datasets",
    "transformers",
    "trl",
    "wandb",
    "rich",
)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    with preloaded(tmp_path_factory.mktemp("trainings")) as server:
        yield server


def test_nothing_is_imported_from_the_current_folder_and_no_secret_is_written(pairs_file: Path, tmp_path: Path) -> None:
    for name in LOCAL_NAMES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name} from the current folder')")
    done = run_verb("train", *TINY, f"data.path={pairs_file}", cwd=tmp_path, **SECRETS)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", *(f"{name}.py" for name in LOCAL_NAMES)}
    written = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr
        assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_a_run_holds_no_pickle_but_of_tensors(trained: Path) -> None:
    (checkpoint,) = runs.checkpoint_folders(trained)
    pickles = {path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl")}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert not [path for path in (trained / "adapter").rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


class Bomb:
    """A pickle of it runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_a_poisoned_checkpoint_is_refused_and_not_executed(
    trainings: Trainings, pairs_file: Path, tmp_path: Path
) -> None:
    """Each file that the trainer reads with torch.load, in a checkpoint that is otherwise whole."""
    whole = trainings.run(
        *TINY, f"data.path={pairs_file}", "dpo.save_steps=1", "logging.wandb.mode=disabled", cwd=tmp_path
    )
    assert whole.status() == 0, whole.err
    (run,) = (tmp_path / "outputs").glob("*/*")
    (run / "metrics.json").unlink()
    last, checkpoint = runs.checkpoint_folders(run)
    shutil.rmtree(last)  # at the last step nothing but the weights is read
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (checkpoint / name).read_bytes()
        torch.save({"state": Bomb()}, checkpoint / name)
        seal(checkpoint)
        resumed = trainings.run("resume=latest", cwd=tmp_path)
        assert resumed.status() == 2, resumed.err
        assert "holds a pickle of something other than tensors" in resumed.err
        assert resumed.err.count("\n") == 1
        assert not list(tmp_path.rglob("executed"))
        (checkpoint / name).write_bytes(kept)


def test_weights_that_are_pickled_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights can run code and are never loaded"):
        locate(str(tmp_path), None)


def test_code_of_a_repository_stays_off_by_default(compose_train: Callable[..., TrainConfig]) -> None:
    assert compose_train().model.trust_remote_code is False


def test_names_from_data_cannot_leave_the_outputs(pairs_file: Path, tmp_path: Path) -> None:
    """A row's id, topic and split name no file."""
    row = PAIRS[0] | dict.fromkeys(("id", "topic", "flaw", "contrast"), "../../escaped") | {"split": "train"}
    home = tmp_path / "home"
    home.mkdir()
    (home / "rows.json").write_text(json.dumps([row, *(pair | {"split": "train"} for pair in PAIRS[1:])]))
    done = run_verb("inspect_data", "data.path=rows.json", "model=tiny", cwd=home)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*escaped*"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_html_in_a_row_is_text_on_the_page(tmp_path: Path) -> None:
    row = PAIRS[0] | {"question": "How <script>alert(1)</script> often?", "topic": "<img src=x>"}
    (tmp_path / "rows.json").write_text(json.dumps([row, *PAIRS[1:]]))
    done = run_verb("inspect_data", "data.path=rows.json", "model=tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.rglob("*.html")
    assert "<script>alert" not in page.read_text()
    assert "<img src=x" not in page.read_text()
