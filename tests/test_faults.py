"""What goes wrong on real machines, done for real: kills, damaged files, a full disk, a wandb server that fails. `make test-faults`."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from fitness_dpo import runs
from fitness_dpo.config import InputError, TrainConfig
from fitness_dpo.failures import explained
from tests.conftest import TINY, mounted, read_json, run_verb
from tests.preloaded import Child, Trainings, preloaded

pytestmark = pytest.mark.faults
SHORT = [
    *TINY, "dpo.max_steps=null", "dpo.epochs=2", "dpo.batch_size=2", "lora.dropout=0.1", "dpo.logging_steps=1", "dpo.save_steps=1",
    "logging.sample_steps=2", "logging.sample_prompts=[How often?]", "logging.wandb.mode=disabled",
]  # fmt: skip
KILLS = 50


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    with preloaded(tmp_path_factory.mktemp("trainings")) as server:
        yield server


@pytest.fixture(scope="module")
def whole(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory, pairs_file: Path) -> Path:
    """The folder of a run that nothing happened to."""
    home = tmp_path_factory.mktemp("whole")
    done = trainings.run(*SHORT, f"data.path={pairs_file}", cwd=home)
    assert done.status() == 0, done.err
    return the_run(home)


def the_run(home: Path) -> Path:
    (run,) = (home / "outputs").glob("*/*")
    return run


def adapter(run: Path) -> dict[str, Any]:
    return {name: value.tolist() for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items()}


def ended(child: Child) -> str:
    assert child.status() == 0, child.out + child.err
    return child.out


def test_killed_at_any_moment_a_run_can_be_resumed_or_read(
    trainings: Trainings, whole: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """kill -9 at KILLS random moments; what was killed is resumed and killed again until it ends, with the same adapter."""
    draw = random.Random(0)  # noqa: S311
    began = time.monotonic()
    ended(trainings.run(*SHORT, f"data.path={pairs_file}", cwd=new(tmp_path / "timed")))
    seconds = time.monotonic() - began
    found: list[str] = []
    finished = 0
    while len(found) < KILLS:
        home = new(tmp_path / f"run-{finished}")
        run: Path | None = None
        while run is None or not (run / "metrics.json").exists():
            fresh = run is None or runs.last_checkpoint(run) is None
            arguments = [*SHORT, f"data.path={pairs_file}"] if fresh else [f"resume={run}"]
            child = trainings.start(*arguments, cwd=home)
            began = time.monotonic()
            time.sleep(draw.uniform(0, seconds))
            child.send(signal.SIGKILL)
            status = child.status()
            run = max((home / "outputs").glob("*/*"), key=lambda path: path.name, default=None)
            if status == 0:
                seconds = min(seconds, time.monotonic() - began)  # so that few runs escape
                break
            assert status == -signal.SIGKILL, child.err
            found.append("nothing yet" if run is None else state(run))
        assert run is not None
        assert adapter(run) == adapter(whole)
        finished += 1
    print(f"{len(found)} kills, {finished} runs to their end, {seconds:.1f} s a run; found: {Counter(found)}")  # noqa: T201


def state(run: Path) -> str:
    """What a kill left. Whatever counts as there is whole."""
    if (run / "metrics.json").exists():
        assert read_json(run / "metrics.json")["steps"] == 6
        assert adapter(run)
        return "finished"
    for name in ("versions.json", "samples.jsonl", "config.yaml"):
        assert not (run / name).exists() or (run / name).read_text().endswith(("\n", "}"))
    checkpoint = runs.last_checkpoint(run)
    torn = sum(
        runs.step_of(folder) > (runs.step_of(checkpoint) if checkpoint else 0)
        for folder in runs.checkpoint_folders(run)
    )
    return ("no checkpoint" if checkpoint is None else "a whole checkpoint") + (" and a torn one" if torn else "")


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name"),
    [(truncate, "optimizer.pt"), (flip_a_bit, "adapter_model.safetensors"), (Path.unlink, "trainer_state.json")],
)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    damage: Callable[[Path], None], name: str, trainings: Trainings, whole: Path, pairs_file: Path, tmp_path: Path
) -> None:
    stopped = trainings.start(*SHORT, f"data.path={pairs_file}", cwd=tmp_path)
    stopped.wait_for("step 3/")
    stopped.send(signal.SIGTERM)
    assert stopped.status() == 143, stopped.err
    run = the_run(tmp_path)
    newest, before = runs.checkpoint_folders(run)
    damage(newest / name)
    out = ended(trainings.run("resume=latest", cwd=tmp_path))
    line = f"resume outputs/{run.parent.name}/{run.name}/checkpoints/{before.name} ({newest.name} is not whole"
    assert line in " ".join(out.split())
    assert adapter(run) == adapter(whole)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    trainings: Trainings, whole: Path, pairs_file: Path, tmp_path: Path
) -> None:
    used = sum(file.stat().st_size for file in (whole / "checkpoints").rglob("*") if file.is_file())
    with mounted(tmp_path, f"size={int(used * 1.2)}"):
        full = trainings.run(*SHORT, f"data.path={pairs_file}", cwd=tmp_path)
        assert full.status() == 2, full.err
        assert full.err.count("\n") == 1
        assert "no space is left on this disk; make room, the checkpoint of step " in full.err
        run = the_run(tmp_path)
        subprocess.run(["mount", "-o", f"remount,size={used * 4}", tmp_path], check=True)
        ended(trainings.run("resume=latest", cwd=tmp_path))
        assert adapter(run) == adapter(whole)


def test_outputs_that_cannot_be_written_are_one_line(trainings: Trainings, pairs_file: Path, tmp_path: Path) -> None:
    with mounted(tmp_path, "ro,size=1m"):
        done = trainings.run(*SHORT, f"data.path={pairs_file}", cwd=tmp_path)
        assert done.status() == 2, done.err
        assert done.err.count("\n") == 1
        assert "no folder can be made there (Read-only file system)" in done.err


def test_two_runs_in_the_same_second_have_a_folder_each(
    trainings: Trainings, whole: Path, pairs_file: Path, tmp_path: Path
) -> None:
    children = [trainings.start(*SHORT, f"data.path={pairs_file}", cwd=tmp_path) for _ in range(2)]
    for child in children:
        ended(child)
    first, second = (tmp_path / "outputs").glob("*/*")
    assert adapter(first) == adapter(second) == adapter(whole)


BUILD = "from fitness_dpo.weights import locate; print(locate('embedded:tiny', None))"


def test_two_processes_that_convert_the_embedded_model_share_one(tmp_path: Path) -> None:
    environment = os.environ | {"FITNESS_DPO_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=200) for process in processes]
    assert {process.returncode for process in processes} == {0}, answers
    assert {out for out, _ in answers} == {f"{tmp_path}/models/tiny\n"}
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["tiny", "tiny.lock"]


class Wandb(BaseHTTPRequestHandler):
    """As much of a wandb server as a run needs to be online."""

    fault = ""

    def log_message(self, *_: object) -> None:
        """The test's output stays its own."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fault == "hangs":
            time.sleep(3600)
        project = {"id": "2", "name": "p", "entity": {"id": "3", "name": "me"}}
        bucket = {"id": "1", "name": "r", "displayName": "r", "description": "", "config": "{}", "sweepName": "",
                  "historyLineCount": 0, "project": project}  # fmt: skip
        answers = {
            "viewer": {"id": "x", "entity": "me", "username": "me", "email": "", "admin": False, "flags": "{}",
                       "teams": {"edges": []}},
            "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []},
            "model": {"bucket": None}, "upsertBucket": {"inserted": True, "bucket": bucket},
            "project": {"__typename": "Project", "artifact": None}, "createArtifact": {"artifact": {
                "id": "4", "state": "COMMITTED", "digest": "", "artifactSequence": {"id": "5", "latestArtifact": None}}},
            "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
        }  # fmt: skip
        if self.fault == "forgets":
            answers = {}
        content = json.dumps({"data": answers} if "graphql" in self.path else {}).encode()
        if self.fault == "babbles":
            content = b'{"data": {"model'
        self.send_response(500 if self.fault == "fails" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def online(port: int) -> dict[str, str]:
    return {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}


@pytest.mark.parametrize("answers", ["refuses", "hangs"])
def test_a_wandb_server_that_does_not_answer_stops_nothing(
    answers: str, whole: Path, pairs_file: Path, tmp_path: Path
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        if answers == "hangs":
            server.listen(100)
        arguments = [*SHORT, f"data.path={pairs_file}", "logging.wandb.mode=auto"]
        done = run_verb("train", *arguments, cwd=tmp_path, **online(port))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("wandb: ")
    assert "recording offline, later: wandb sync" in done.stderr
    assert done.stderr.count("\n") == 1
    run = the_run(tmp_path)
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert adapter(run) == adapter(whole)


@pytest.mark.parametrize("fault", ["vanishes", "hangs", "fails", "babbles", "forgets"])
def test_a_wandb_server_that_fails_in_mid_run_stops_nothing(
    fault: str, whole: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample tables are logged before, at and after the step at which the server goes wrong. To wandb an answer that is no JSON is
    an answer. Not forked: wandb's temporary folder belongs to the process that imports it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wandb)
    monkeypatch.setattr(Wandb, "fault", "")
    Thread(target=server.serve_forever, daemon=True).start()
    arguments = [*SHORT, f"data.path={pairs_file}", "logging.wandb.mode=online"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | online(server.server_port)
    command = [sys.executable, "-m", "fitness_dpo.train", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=PIPE, stderr=PIPE, text=True) as child:
        assert child.stdout is not None
        assert any(line.startswith("step 2/") for line in child.stdout), child.communicate()
        began = time.monotonic()
        monkeypatch.setattr(Wandb, "fault", fault)
        if fault == "vanishes":
            server.shutdown()
            server.server_close()
        out, err = child.communicate(timeout=600)
    print(f"wandb server {fault}: {time.monotonic() - began:.0f} s to the end of the run; {err}")  # noqa: T201
    assert child.returncode == 0, out + err
    lines = [line for line in err.splitlines() if line.startswith("wandb: ")]
    assert len(lines) == (fault != "babbles"), err
    assert all("training goes on without it" in line for line in lines)
    run = the_run(tmp_path)
    assert adapter(run) == adapter(whole)


def test_out_of_memory_names_what_to_lower(compose_train: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """The line alone: no GPU runs out of memory here."""
    config = compose_train("model=smollm2_135m")
    with (
        pytest.raises(
            InputError,
            match=r"lower dpo\.batch_size=4 .*or set dpo\.micro_batch_tokens=1024 or model\.gradient_checkpointing",
        ),
        explained(config, tmp_path),
    ):
        raise torch.OutOfMemoryError
