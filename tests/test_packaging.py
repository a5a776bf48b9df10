"""The wheel and the notebook, each in surroundings of their own. Slow: make test-slow."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.conftest import ROOT, TINY

pytestmark = pytest.mark.slow


def test_the_wheel_trains_and_answers_from_another_folder(pairs_file: Path, tmp_path: Path) -> None:
    """Installed into a fresh environment that borrows only the dependencies of this one."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv", ".git", "outputs", "build", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert {
        "fitness_dpo/conf/config.yaml",
        "fitness_dpo/fitness_qa/nutrition.json",
        "fitness_dpo/templates/report.html.jinja",
    } <= set(zipfile.ZipFile(wheel).namelist())

    home = tmp_path / "fresh"
    venv.create(home, with_pip=False, symlinks=True)
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    dependencies = [
        folder for folder in sys.path if folder.endswith("site-packages")
    ]  # torch may lie in another than .venv's
    work = tmp_path / "elsewhere"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": ":".join([str(site), *dependencies]), "CUDA_VISIBLE_DEVICES": ""}
    for command in (
        ["train", *TINY, f"data.path={pairs_file}"],
        ["train", "model=tiny", "dpo.max_steps=1"],
        ["infer", "prompt=Hi"],
    ):
        done = subprocess.run(
            [str(home / "bin" / "python"), "-P", "-m", f"fitness_dpo.{command[0]}", *command[1:]],
            cwd=work, capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_notebook_runs_from_first_to_last_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".venv", ".git", "outputs", ".*_cache"))
    (repository / "outputs").mkdir()
    (repository / ".venv").symlink_to(Path(sys.prefix))
    monkeypatch.setenv("REPOSITORY", str(repository))
    monkeypatch.setenv(
        "RECIPE", "model=smollm2_135m dpo.max_steps=2 data.max_validation_rows=4 logging.sampling.max_new_tokens=16"
    )
    monkeypatch.setenv("EVALUATION", "limit=2 max_new_tokens=8 questions=2")
    notebook = nbformat.read(repository / "notebooks" / "kaggle.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=580, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "held-out accuracy" in printed
    assert "verdict" in printed
    assert "error" not in printed.lower()
    assert (repository / "adapter.zip").stat().st_size > 1_000_000
