"""The jobs of a sweep as tasks of a Ray cluster. Import it only where ray is installed. Imports no torch."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import ray

from fitness_dpo import jobs
from fitness_dpo.config import InputError


class RayJobs:
    """Each job declares its CPUs and GPUs, and Ray keeps those for it alone. Machines share the run and cache folders."""

    def __init__(self, at_once: int | None, address: str | None, num_cpus: int, num_gpus: int | None) -> None:
        if not ray.is_initialized():
            alone: dict[str, Any] = {"include_dashboard": False} if address is None else {}
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **alone)
            except ConnectionError as error:
                raise InputError(
                    f"hydra.launcher.address={address}: no Ray cluster there; ray start --head makes one"
                ) from error
        held: dict[str, float] = ray.cluster_resources()
        gpus = int(held.get("GPU", 0) > 0) if num_gpus is None else num_gpus
        room = min(int(held.get("CPU", 0) // num_cpus), int(held.get("GPU", 0) // gpus) if gpus else 2**31)
        if room < 1:
            raise InputError(
                f"hydra.launcher.num_cpus={num_cpus} hydra.launcher.num_gpus={gpus}: the cluster has {held.get('CPU', 0):g} CPUs "
                f"and {held.get('GPU', 0):g} GPUs in all; ask for less"
            )
        self.at_once = at_once or room
        self.task: Any = ray.remote(run_job).options(num_cpus=num_cpus, num_gpus=gpus, max_retries=0)
        self.environment = {"OMP_NUM_THREADS": str(num_cpus)}
        if "FITNESS_DPO_CACHE" in os.environ:
            self.environment["FITNESS_DPO_CACHE"] = str(Path(os.environ["FITNESS_DPO_CACHE"]).resolve())
        self.running: dict[int, Any] = {}

    def start(self, job: jobs.Job) -> None:
        self.running[job.number] = self.task.remote(str(job.folder.resolve()), str(Path.cwd()), self.environment)

    def ended(self, job: jobs.Job) -> bool:
        done, _ = ray.wait([self.running[job.number]], timeout=0)
        if not done:
            return False
        try:
            status, killed_for_memory = ray.get(self.running.pop(job.number))
        except ray.exceptions.RayError as error:
            job.fail(f"Ray lost it: {str(error).strip().splitlines()[0]}")
        else:
            job.end(status, killed_for_memory=killed_for_memory)
        return True

    def stop(self) -> None:
        for task in self.running.values():
            ray.cancel(task)
        if self.running:
            ray.wait(list(self.running.values()), num_returns=len(self.running), timeout=jobs.GRACE_SECONDS)


def run_job(folder: str, cwd: str, environment: dict[str, str]) -> tuple[int, bool]:
    """Run the training of `folder` on the machine that Ray chose; its exit status, and whether the kernel ended it for memory."""
    os.chdir(cwd)
    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    kills = jobs.kernel_kills()
    process = jobs.spawn(Path(folder), environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)})
    try:
        status = process.wait()
    except KeyboardInterrupt:  # how ray.cancel ends a task
        jobs.stop([process])
        raise
    return status, status == -signal.SIGKILL and jobs.kernel_kills() > kills
