"""What Hydra runs a sweep with: conf/hydra/ names these classes. Imports no torch."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from fitness_dpo import jobs, leaderboard, search, sweep
from fitness_dpo.config import InputError, SweepConfig, TrainConfig

NAMESPACE = "hydra_plugins.fitness_dpo"  # where Hydra looks for them; that package names the classes of this module


def register() -> None:
    """Make the sweeper and the launcher known to Hydra, whose own search finds none in an editable install."""
    for plugin in (GridSweeper, OptunaSweeper, ProcessLauncher, RayLauncher):
        Plugins.instance().register(plugin)


class FitnessSweeper(Sweeper):
    """What both sweepers share."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.master = hydra_context, config
        self.launching = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def parse(self, arguments: list[str]) -> list[Override]:
        return OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(arguments)


class GridSweeper(FitnessSweeper):
    """Every combination, as Hydra's own sweeper; but nothing is written before every job's config is known to be right."""

    __module__ = NAMESPACE

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        overrides = self.parse(arguments)
        for override in overrides:
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise InputError(
                    f"{override.input_line}: a grid takes values, as in {override.key_or_group}=1,2,3; add hydra/sweeper=optuna to search an interval"
                )
        (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        returned = self.launching.launch(batch, initial_job_idx=0)
        folder, console = Path(self.master.hydra.sweep.dir), Console()
        if leaderboard.publish(folder, console).unfinished:
            say(console, sweep.how_to_resume(folder))
            sys.exit(1)
        return returned


class OptunaSweeper(FitnessSweeper):
    """Picks each trial's values with Optuna's TPE from what the trials before came to."""

    __module__ = NAMESPACE

    def __init__(self, n_trials: int, n_jobs: int, objectives: list[str], seed: int) -> None:
        self.settings: Any = {"n_trials": n_trials, "n_jobs": n_jobs, "objectives": list(objectives), "seed": seed}

    def sweep(self, arguments: list[str]) -> None:
        search.check(**self.settings)
        folder, console = Path(self.master.hydra.sweep.dir), Console()
        found = search.search(self.parse(arguments), self.launch, folder, **self.settings)
        leaderboard.publish(folder, console)
        for best in found:
            say(console, f"trial {best['trial']}  {best['settings']}  {best['values']}")
        if not found:
            sys.exit(1)

    def launch(self, overrides: list[list[str]], first: int) -> Sequence[JobReturn]:
        return self.launching.launch(overrides, initial_job_idx=first)


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class ProcessLauncher(Launcher):
    """Runs every job in a process of its own on this machine."""

    __module__ = NAMESPACE

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.master = hydra_context, config
        self.console = Console()
        self.sweep: sweep.Sweep | None = None

    def runner(self, settings: SweepConfig, lock: int) -> jobs.Runner:
        return jobs.Processes(settings.at_once, lock)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run each list of overrides, sweep.seeds times. The value returned for each is its jobs."""
        composed = [
            self.compose(list(overrides)) for overrides in job_overrides
        ]  # a mistake in any ends the sweep here
        folder, settings = Path(self.master.hydra.sweep.dir), composed[0].sweep
        with sweep.locked(folder) as lock:
            if self.sweep is None:
                self.sweep = sweep.Sweep(folder, self.master.hydra.overrides.task, self.master.hydra.overrides.hydra)
            batch = [
                self.sweep.add(initial_job_idx + place, list(overrides), config)
                for place, (overrides, config) in enumerate(zip(job_overrides, composed, strict=True))
            ]
            try:
                self.sweep.run([job for each in batch for job in each], self.runner(settings, lock), self.console)
            except KeyboardInterrupt:
                say(self.console, sweep.how_to_resume(folder))
                raise
        return [returned(list(overrides), each) for overrides, each in zip(job_overrides, batch, strict=True)]

    def compose(self, overrides: list[str]) -> TrainConfig:
        composed = self.context.config_loader.load_sweep_config(self.master, overrides)
        with open_dict(composed):
            del composed["hydra"]
        OmegaConf.resolve(composed)
        return cast(TrainConfig, OmegaConf.to_object(composed))


class RayLauncher(ProcessLauncher):
    """Runs every job as a task of a Ray cluster."""

    __module__ = NAMESPACE

    def __init__(self, address: str | None, num_cpus: int, num_gpus: int | None) -> None:
        self.cluster: Any = {"address": address, "num_cpus": num_cpus, "num_gpus": num_gpus}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raise InputError where no job can be started; out of __init__ Hydra would wrap it."""
        if find_spec("ray") is None:
            raise InputError("hydra/launcher=ray: ray is not installed; pip install 'fitness-dpo[ray]'")
        cpus, gpus = self.cluster["num_cpus"], self.cluster["num_gpus"]
        if not isinstance(cpus, int) or cpus < 1:
            raise InputError(f"hydra.launcher.num_cpus={cpus}: use a whole number, 1 or more")
        if gpus is not None and (not isinstance(gpus, int) or gpus < 0):
            raise InputError(f"hydra.launcher.num_gpus={gpus}: use a whole number, 0 or more, or null")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def runner(self, settings: SweepConfig, lock: int) -> jobs.Runner:
        from fitness_dpo.ray_jobs import RayJobs

        return RayJobs(settings.at_once, **self.cluster)


def returned(overrides: list[str], batch: list[jobs.Job]) -> JobReturn:
    failed = [job for job in batch if job.state not in jobs.DONE]
    answer = JobReturn(overrides=overrides, status=JobStatus.FAILED if failed else JobStatus.COMPLETED)
    answer.return_value = RuntimeError(failed[0].reason) if failed else batch
    return answer
