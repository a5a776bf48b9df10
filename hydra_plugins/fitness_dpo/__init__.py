"""Hydra only takes plugins from the namespace hydra_plugins; these are written in fitness_dpo.plugins."""

from fitness_dpo.plugins import GridSweeper, OptunaSweeper, ProcessLauncher, RayLauncher

__all__ = ["GridSweeper", "OptunaSweeper", "ProcessLauncher", "RayLauncher"]
