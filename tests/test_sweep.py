"""A sweep's jobs run apart, what becomes of each is on record, and the same command finishes what is missing."""

import contextlib
import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fitness_dpo import jobs, runs, sweep
from fitness_dpo.config import InputError
from tests.conftest import TINY, read_json, run_verb
from tests.test_health import LONGER, SETTINGS
from tests.test_runs import wandb_records

QUIET = [*TINY, "logging.wandb.mode=disabled", "dpo.logging_steps=1"]


def one_line(*arguments: str, cwd: Path) -> str:
    done = run_verb("train", "-m", *arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dpo.beta=0.1,high"], "dpo.beta: Value 'high' of type 'str' could not be converted to Float"),
        (["dpo.beta=0.1,0"], "dpo.beta=0.0: use more than 0"),
        (["health.stop_on=[no learning]"], "health.stop_on=no learning: choose one of displacement, over-fitting"),
        (["dpo.beta=interval(0.1,0.2)"], "a grid takes values, as in dpo.beta=1,2,3"),
        (["dpo.beta=0.1,0.2", "hydra/launcher=slurm"], "hydra/launcher=slurm: there is no such choice; choose one of"),
        (["dpo.beta=0.1,0.2", "sweep.resume=latest"], "sweep.resume=latest: no sweep under"),
        (["dpo.beta=0.1,0.2", "sweep.resume=empty"], "sweep.resume=empty: no sweep.json there"),
    ],
)
def test_a_mistake_ends_the_sweep_before_its_first_job(arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert expected in one_line(*arguments, cwd=tmp_path)
    assert not list(tmp_path.rglob("*.*")), "nothing may be left behind"


@pytest.mark.parametrize(("package", "choice"), [("ray", "hydra/launcher=ray"), ("optuna", "hydra/sweeper=optuna")])
def test_what_is_not_installed_is_said_in_a_line(package: str, choice: str, tmp_path: Path) -> None:
    """None in sys.modules makes Python take the package for missing."""
    words = ["train", "-m", "dpo.beta=0.1,0.2", choice]
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {words}; runpy.run_module('fitness_dpo.train', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {choice}: {package} is not installed; pip install 'fitness-dpo[{package}]'\n"
    assert not list(tmp_path.rglob("*.*"))


def test_a_job_keeps_the_time_limit_of_its_sweep(tmp_path: Path) -> None:
    for minutes, expected in (("30.0", ["max_minutes=30.0"]), ("null", [])):
        (tmp_path / "config.yaml").write_text(f"max_minutes: {minutes}\n")
        assert jobs.command(tmp_path)[4:] == expected


def test_a_sweep_setting_without_a_sweep_is_refused(tmp_path: Path) -> None:
    done = run_verb("train", "sweep.seeds=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: sweep.seeds=3: this is one run; add -m to make it a sweep\n"


def test_a_failed_job_is_on_record_and_only_it_runs_again(pairs_file: Path, tmp_path: Path) -> None:
    shutil.copy(pairs_file, tmp_path / "a.json")
    command = ["-m", *TINY, "dpo.logging_steps=1", "data.path=a.json,b.json"]
    done = run_verb("train", *command, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (folder,) = (tmp_path / "outputs" / "multirun").glob("*/*")
    record = read_json(folder / "sweep.json")
    assert [job["state"] for job in record["jobs"]] == ["finished", "failed"]
    assert "b.json: no such file" in record["jobs"][1]["reason"]
    assert (folder / "1" / "failure.txt").read_text().strip() == record["jobs"][1]["reason"]
    assert f"sweep.resume={folder.relative_to(tmp_path)}" in done.stdout
    first = (folder / "0" / "metrics.json").stat().st_mtime_ns

    others = one_line("data.path=a.json,c.json", "sweep.resume=latest", cwd=tmp_path)
    assert "another command made that sweep" in others
    text = (folder / "0" / "config.yaml").read_text()
    (folder / "0" / "config.yaml").write_text(text.replace("beta: 0.1", "beta: 0.5"))
    assert "dpo.beta=0.1 now, and job 0 was made with dpo.beta=0.5" in one_line(
        *command[1:], "sweep.resume=latest", cwd=tmp_path
    )
    (folder / "0" / "config.yaml").write_text(text)

    shutil.copy(pairs_file, tmp_path / "b.json")
    again = run_verb("train", *command, "sweep.resume=latest", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [job["state"] for job in read_json(folder / "sweep.json")["jobs"]] == ["finished", "finished"]
    assert (folder / "0" / "metrics.json").stat().st_mtime_ns == first
    assert not (folder / "1" / "failure.txt").exists()
    assert (folder / "leaderboard.csv").read_text().count("\n") == 3
    assert read_json(folder / "1" / "progress.json")["step"] == 2
    groups, names = zip(*(wandb_group_and_id(folder / job) for job in ("0", "1")), strict=True)
    assert set(groups) == {"-".join(folder.parts[-2:])}
    assert len(set(names)) == 2, "one wandb run for each job"


def wandb_group_and_id(run: Path) -> tuple[str, str]:
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for content in wandb_records(file):
        record = records.Record()
        record.ParseFromString(content)
        if record.HasField("run"):
            return record.run.run_group, record.run.run_id
    raise AssertionError("no run in the file")


@pytest.mark.parametrize(
    ("status", "said", "kernel", "expected"),
    [
        (-9, "", False, "killed by SIGKILL"),
        (-9, "", True, "out of memory: the kernel ended it with SIGKILL; lower"),
        (1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n\n", False, "out of memory: torch.OutOf"),
        (
            2,
            "step 1\nerror: data.path=x: no such file; check\n",
            False,
            "exit status 2: data.path=x: no such file; check",
        ),
        (0, "", False, "exit status 0: it said nothing"),
    ],
)
def test_why_a_job_failed_is_one_line(status: int, said: str, kernel: bool, expected: str, tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text(said)
    line = jobs.reason(status, tmp_path / "output.log", killed_for_memory=kernel)
    assert line.startswith(expected)
    assert "\n" not in line


def test_each_of_two_jobs_has_a_gpu_and_half_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr(jobs, "gpu_names", lambda: ["3", "GPU-5"])
    monkeypatch.setattr(jobs, "command", lambda folder: [sys.executable, "-c", show])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = [jobs.Job(number=n, setting=n, overrides=[], folder=tmp_path / str(n)) for n in range(3)]
    with sweep.locked(tmp_path) as lock:
        runner = jobs.Processes(None, lock)
        assert runner.at_once == 2
        for job in made:
            job.folder.mkdir()
            while not runner.free:
                runner.ended(made[0])
            runner.start(job)
        while not all(number not in runner.running or runner.ended(made[number]) for number in (1, 2)):
            time.sleep(0.05)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    said = [(job.folder / "output.log").read_text() for job in made]
    assert said == [f"3 {threads}\n", f"GPU-5 {threads}\n", f"3 {threads}\n"]


def test_a_sweep_that_still_runs_cannot_be_resumed(tmp_path: Path) -> None:
    """The processes of a killed sweep hold its folder as long as they live."""
    with sweep.locked(tmp_path) as lock:
        orphan = subprocess.Popen(["sleep", "30"], pass_fds=[lock])
    try:
        with pytest.raises(InputError, match="still runs"), sweep.locked(tmp_path):
            pass
    finally:
        orphan.kill()
        orphan.wait()
    with sweep.locked(tmp_path):
        pass


@contextlib.contextmanager
def started(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m fitness_dpo.train -m arguments`, running; killed with its jobs at the end if still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fitness_dpo.train", "-m", *arguments], cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        for each in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            each.kill()
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[Any], condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def states(folder: Path) -> list[str]:
    return [job["state"] for job in read_json(folder / "sweep.json")["jobs"]]


def losses(folder: Path, job: int | str) -> list[float]:
    return [entry["loss"] for entry in read_json(folder / str(job) / "metrics.json")["history"] if "loss" in entry]


@pytest.mark.slow
def test_hopeless_jobs_end_early_stand_last_and_do_not_run_again(tmp_path: Path) -> None:
    """One rate loses the chosen answers, one explodes, one is too low to do harm."""
    (tmp_path / "pairs.json").write_text(json.dumps(LONGER), encoding="utf-8")
    words = [
        *QUIET, *SETTINGS, "data.path=pairs.json", "dpo.epochs=4", "health.stop_on=[displacement]", "logging.sample_prompts=[]",
        "dpo.learning_rate=5e-3,1e30,1e-9", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    done = run_verb("train", "-m", *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "sweep"
    assert states(folder) == ["stopped", "stopped", "finished"]
    reasons = [job["reason"] for job in read_json(folder / "sweep.json")["jobs"]]
    assert reasons[0].startswith("displacement: log-probability of the held-out chosen answers -")
    assert reasons[0].endswith("(training ended at step 10 of 24)")
    assert reasons[1].startswith("explosion: ")
    assert reasons[2] is None
    assert not (folder / "1" / "metrics.json").exists()
    with (folder / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["jobs"], row["vetoed"], row["accuracy"] != "") for row in rows] == [
        ("2", "False", True), ("0", "True", True), ("1", "True", False),
    ]  # fmt: skip
    ends = [(folder / str(job) / "output.log").stat().st_mtime_ns for job in range(3)]
    again = run_verb("train", "-m", *words, "sweep.resume=sweep", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(folder) == ["stopped", "stopped", "finished"]
    assert [(folder / str(job) / "output.log").stat().st_mtime_ns for job in range(3)] == ends


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

def job(folder):
    number, first = folder.name, not (folder / "started").exists()
    with (folder / "started").open("a") as file:
        file.write("x")
    if first and number == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if first and number == "2":
        sys.exit("RuntimeError: no luck")
    if first and number == "4":
        time.sleep(60)
    after = {"eval_rewards/accuracies": 0.5 + int(number) / 100, "eval_rewards/margins": 0.3, "eval_rewards/chosen": -0.1}
    rows = {"validation": 77, "too_long": {"validation": 0}}
    metrics = {"after": after, "rows": rows, "seconds": 1.0, "peak_memory_gib": 0.1}
    (folder / "metrics.json").write_text(json.dumps(metrics))

if sys.argv[1] == "job":
    job(Path(sys.argv[2]))
else:
    from fitness_dpo import cli, config, jobs, plugins, train
    jobs.command = lambda folder: [sys.executable, __file__, "job", str(folder.resolve())]
    plugins.register()
    cli.verb("config", config.TrainConfig, train.main)
"""


def test_a_kill_a_failure_and_ctrl_c_cost_no_job_and_repeat_none(tmp_path: Path) -> None:
    """The sweep's side of it alone: its jobs are stand-ins that train nothing. Slow: the same with real runs, below."""
    (tmp_path / "sweep.py").write_text(STAND_IN)
    words = ["-m", "dpo.beta=0.05,0.1,0.3", "lora.r=4,8", "hydra.sweep.dir=sweep"]
    command = [sys.executable, str(tmp_path / "sweep.py"), *words]
    folder = tmp_path / "sweep"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    wait_for(process, lambda: (folder / "4" / "started").is_file())
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "sweep.resume=sweep" in said
    assert states(folder) == ["finished", "failed", "failed", "finished", "interrupted", "waiting"]
    reasons = [job["reason"] for job in read_json(folder / "sweep.json")["jobs"]]
    assert reasons[1:3] == ["killed by SIGKILL", "exit status 1: RuntimeError: no luck"]

    again = subprocess.run([*command, "sweep.resume=sweep"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(folder) == ["finished"] * 6
    assert [(folder / str(job) / "started").read_text() for job in range(6)] == ["x", "xx", "xx", "x", "xx", "x"]
    assert (folder / "leaderboard.csv").read_text().splitlines()[1].startswith("1,5,0.3,8,0.55,77,")


@pytest.mark.slow
def test_nine_runs_survive_a_kill_a_failure_and_an_interruption(pairs_file: Path, tmp_path: Path) -> None:
    """Job 1 is killed, job 2 cannot write its checkpoints, Ctrl-C stops job 4 after a checkpoint; the same command finishes
    what is left, and job 4 ends with the numbers of a run that nothing stopped."""
    folder = tmp_path / "outputs" / "multirun" / "day" / "time"
    arguments = [*grid(pairs_file), f"hydra.sweep.dir={folder}"]
    (folder / "2").mkdir(parents=True)
    (folder / "2" / "checkpoints").write_text("in the way")
    with started(*arguments, cwd=tmp_path) as process:
        sweep = psutil.Process(process.pid)
        wait_for(process, lambda: (folder / "1" / "output.log").is_file() and sweep.children())
        (job,) = sweep.children()
        job.kill()
        wait_for(process, lambda: runs.last_checkpoint(folder / "4"))
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"sweep.resume={folder}" in said
    assert states(folder) == ["finished", "failed", "failed", "finished", "interrupted", *["waiting"] * 4]
    record = read_json(folder / "sweep.json")["jobs"]
    assert record[1]["reason"] == "killed by SIGKILL"
    assert "checkpoints" in record[2]["reason"]
    before = {job: (folder / job / "metrics.json").stat().st_mtime_ns for job in ("0", "3")}

    (folder / "2" / "checkpoints").unlink()
    again = run_verb("train", "-m", *arguments, f"sweep.resume={folder}", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(folder) == ["finished"] * 9
    assert {job: (folder / job / "metrics.json").stat().st_mtime_ns for job in ("0", "3")} == before, "none runs twice"
    assert (folder / "leaderboard.csv").read_text().count("\n") == 10
    whole = run_verb(
        "train", *QUIET, "dpo.beta=0.1", "lora.r=8", "dpo.max_steps=8", f"data.path={pairs_file}", cwd=tmp_path,
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    (alone,) = (tmp_path / "outputs").glob("20*/*")
    assert losses(folder, 4) == losses(alone.parent, alone.name)


@pytest.mark.slow
def test_three_betas_on_the_embedded_model(tmp_path: Path) -> None:
    words = [
        "model=smollm2_135m", "dpo.beta=0.05,0.1,0.3", "dpo.max_steps=2", "dpo.logging_steps=1", "dpo.warmup_ratio=0", "data.max_rows=8",
        "data.max_validation_rows=4", "logging.sample_prompts=[]", "logging.wandb.mode=disabled", "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    done = run_verb("train", "-m", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(tmp_path / "sweep") == ["finished"] * 3
    with (tmp_path / "sweep" / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["dpo.beta"] for row in rows} == {"0.05", "0.1", "0.3"}
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert len({losses(tmp_path / "sweep", job)[-1] for job in range(3)}) == 3, "every beta has a loss of its own"


def grid(pairs_file: Path) -> list[str]:
    """Nine runs of eight steps with a checkpoint at each."""
    return [
        "dpo.beta=0.05,0.1,0.3", "lora.r=4,8,16", *QUIET, "dpo.max_steps=8", "dpo.save_steps=1", f"data.path={pairs_file}",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_at_once_and_ray_give_the_numbers_of_one_after_another(pairs_file: Path, tmp_path: Path) -> None:
    """Ray on a cluster of its own, with two GPUs that only Ray believes in."""
    pytest.importorskip("ray", reason="an extra beside the lock: pip install fitness-dpo[ray]")
    words = [
        *QUIET, "dpo.beta=0.05,0.1,0.3", "dpo.warmup_ratio=0", "dpo.learning_rate=1e-3", "dpo.max_steps=4", f"data.path={pairs_file}",
    ]  # fmt: skip
    alone = tmp_path / "alone"
    done = run_verb("train", "-m", *words, f"hydra.sweep.dir={alone}", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = [losses(alone, job) for job in range(3)]
    assert len({loss for each in expected for loss in each[1:]}) == 9, "every step of every beta has a loss of its own"
    twice = tmp_path / "twice"
    done = run_verb(
        "train", "-m", *words, "sweep.at_once=2", f"hydra.sweep.dir={twice}", cwd=tmp_path, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [losses(twice, job) for job in range(3)] == expected
    ray = str(Path(sys.executable).with_name("ray"))
    start = [sys.executable, ray] if Path(ray).is_file() else [sys.executable, "-m", "ray.scripts.scripts"]
    home = tempfile.mkdtemp(prefix="ray")  # a socket's path may have 107 bytes, which pytest's own folders use up
    said = tmp_path / "ray.log"
    with said.open("wb") as output:
        head = subprocess.Popen(
            [*start, "start", "--head", "--port=6390", "--num-cpus=2", "--num-gpus=2", "--include-dashboard=false", "--block",
             f"--temp-dir={home}"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
    try:
        wait_for(head, lambda: "Ray runtime started" in said.read_text())
        folder = tmp_path / "cluster"
        arguments = [
            *words, f"hydra.sweep.dir={folder}", "hydra/launcher=ray", "hydra.launcher.address=127.0.0.1:6390", "sweep.at_once=2",
        ]  # fmt: skip
        leases: dict[str, set[str]] = {}
        with started(*arguments, cwd=tmp_path) as process:
            while process.poll() is None:
                for each in psutil.process_iter(["cmdline"]):
                    words_of = " ".join(each.info["cmdline"] or [])
                    with contextlib.suppress(psutil.Error):
                        if "fitness_dpo.train" in words_of and f"{folder}/" in words_of:
                            leases.setdefault(each.environ()["CUDA_VISIBLE_DEVICES"], set()).add(words_of)
                time.sleep(0.2)
            assert process.returncode == 0, process.communicate()[0]
        assert sum(len(held) for held in leases.values()) == 3
        assert set(leases) == {"0", "1"}
        assert [losses(folder, job) for job in range(3)] == expected
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(home, ignore_errors=True)
