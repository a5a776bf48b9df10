"""Hydra only takes plugins from the namespace hydra_plugins; these are written in fitness_dpo.plugins."""

from fitness_dpo.plugins import GridSweeper, ProcessLauncher

__all__ = ["GridSweeper", "ProcessLauncher"]
