"""Optuna picks what the next runs of a sweep try. Imports no torch."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn, JobStatus

from fitness_dpo import leaderboard, runs, sweep
from fitness_dpo.config import InputError
from fitness_dpo.jobs import Job

if TYPE_CHECKING:
    import optuna

RESULT = "search.json"
DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {
    "accuracy": "maximize", "margin": "maximize", "chosen_change": "maximize", "quiz": "maximize",
    "answer_words": "minimize", "seconds": "minimize", "memory_gib": "minimize",
}  # fmt: skip
Launch = Callable[[list[list[str]], int], Sequence[JobReturn]]


def search(
    overrides: list[Override],
    launch: Launch,
    folder: Path,
    *,
    n_trials: int,
    n_jobs: int,
    objectives: list[str],
    seed: int,
) -> list[dict[str, Any]]:
    """Ask for trials, launch them, tell what came of them; the best: one, or with several objectives those that no other beats
    in all. Every trial is in search.json.

    A trial that failed, or lacks an objective's figure, is told as failed; one that a health verdict stopped, or whose
    chosen answers were displaced, as pruned, which TPE takes for worse than all that have figures. The trials of a sweep that is resumed come first, with the values they had.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fixed = [f"{override.get_key_element()}={override.get_value_element_as_str()}" for override in overrides if not override.is_sweep_override()]  # fmt: skip
    space = {
        override.get_key_element(): distribution(override) for override in overrides if override.is_sweep_override()
    }
    if not space:
        raise InputError(
            "hydra/sweeper=optuna: nothing to search; give a setting a range, as in dpo.beta=interval(0.05,0.5)"
        )
    study = optuna.create_study(
        directions=[DIRECTIONS[name] for name in objectives], sampler=optuna.samplers.TPESampler(seed=seed)
    )
    for known in earlier_trials(folder, space):
        study.enqueue_trial(known)
    for first in range(0, n_trials, n_jobs):
        trials = [study.ask(space) for _ in range(min(n_jobs, n_trials - first))]
        words = [[*fixed, *(f"{name}={value}" for name, value in trial.params.items())] for trial in trials]
        for trial, returned in zip(trials, launch(words, first), strict=True):
            state, values = outcome(returned, objectives)
            study.tell(trial, values, state=state)
        runs.write_whole(
            folder / RESULT,
            json.dumps(
                {"objectives": objectives, "best": best(study), "trials": [plain(trial) for trial in study.trials]},
                indent=1,
            ),
        )
    return best(study)


def check(*, n_trials: int, n_jobs: int, objectives: list[str], seed: int) -> None:
    """Raise InputError where the search cannot begin."""
    if find_spec("optuna") is None:
        raise InputError("hydra/sweeper=optuna: optuna is not installed; pip install 'fitness-dpo[optuna]'")
    for name, value, least in (("n_trials", n_trials, 1), ("n_jobs", n_jobs, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"hydra.sweeper.{name}={value}: use a whole number, {least} or more")
    for objective in objectives or [""]:
        if objective not in DIRECTIONS:
            raise InputError(f"hydra.sweeper.objectives={objective}: choose one or several of {', '.join(DIRECTIONS)}")


def distribution(override: Override) -> "optuna.distributions.BaseDistribution":
    """What Optuna draws from for Hydra's interval, range or list of values."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        if low is None or high is None or not low < high:
            raise InputError(f"{override.input_line}: an interval goes from a number to a higher one")
        if "log" in sweep.tags and low <= 0:
            raise InputError(f"{override.input_line}: a logarithmic interval begins above 0")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log="log" in sweep.tags)
        return FloatDistribution(low, high, log="log" in sweep.tags)
    if isinstance(sweep, RangeSweep) and not sweep.shuffle:
        values: list[Any] = list(sweep.range())
        kind: Any = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
        drawn: BaseDistribution = kind(min(values), max(values), step=abs(sweep.step))
        return drawn
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def earlier_trials(folder: Path, space: dict[str, "optuna.distributions.BaseDistribution"]) -> list[dict[str, Any]]:
    """The values of every trial that the sweep's record knows, in order."""
    record = sweep.read_record(folder) or {"jobs": []}
    trials: dict[int, dict[str, Any]] = {}
    for job in record["jobs"]:
        given = leaderboard.values_of(job["overrides"])
        values = {
            name: given[name] if hasattr(each, "choices") else each.to_external_repr(float(given[name]))
            for name, each in space.items()
        }
        trials.setdefault(job["setting"], values)
    return list(trials.values())


def outcome(returned: JobReturn, objectives: list[str]) -> tuple["optuna.trial.TrialState", list[float] | None]:
    from optuna.trial import TrialState

    if returned.status != JobStatus.COMPLETED:
        return TrialState.FAIL, None
    jobs: list[Job] = returned.return_value
    if any(job.state == "stopped" or leaderboard.displaced(job.folder) for job in jobs):
        return TrialState.PRUNED, None
    figures = leaderboard.mean([leaderboard.run_figures(job.folder) for job in jobs])._asdict()
    values = [figures[name] for name in objectives]
    return (TrialState.FAIL, None) if None in values else (TrialState.COMPLETE, values)


def best(study: "optuna.Study") -> list[dict[str, Any]]:
    finished = any(trial.state.name == "COMPLETE" for trial in study.trials)
    return [plain(trial) for trial in study.best_trials] if finished else []


def plain(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    return {
        "trial": trial.number, "state": trial.state.name.lower(), "settings": trial.params, "values": trial.values,
    }  # fmt: skip
