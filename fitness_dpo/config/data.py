"""conf/data: which rows, how they are cleaned and split."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from fitness_dpo.config.checks import one_of, require


@dataclass(slots=True, kw_only=True)
class ColumnsConfig:
    """Names of the columns of a file whose format is none of docs/formats.md; all null recognises the format."""

    prompt: str | None = MISSING
    chosen: str | None = MISSING
    rejected: str | None = MISSING
    system: str | None = MISSING

    def __post_init__(self) -> None:
        named = [name for name in (self.prompt, self.chosen, self.rejected) if name is not None]
        require(
            len(named) == 3 or (not named and self.system is None),
            "data.columns", self.named(), "name all three of prompt, chosen and rejected (system may be left out)",
        )  # fmt: skip

    def named(self) -> dict[str, str]:
        """Our name -> the file's name, for those that are given."""
        keys = ("prompt", "chosen", "rejected", "system")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


@dataclass(slots=True, kw_only=True)
class DataConfig:
    path: Any = MISSING
    """A file (JSON, JSONL, CSV, TSV, Parquet, each plain or .gz), a folder of them, a hub dataset id, a list of these, or
    a mapping from these to weights: how often each training row is used, such as 2 or 0.5. `fitness_qa` is the embedded set."""
    columns: ColumnsConfig = MISSING
    own_splits: bool = MISSING
    """Keep rows in the `split` they name; false sorts them by `seed` like rows that name none."""
    validation_size: float = MISSING
    """Share of the questions (below 1) or number of rows (1 and above) held out to watch training, where rows name no split."""
    test_size: float = MISSING
    """The same for rows that training never sees."""
    max_rows: int | None = MISSING
    """Keep at most this many training rows, drawn by `seed`; null keeps all."""
    max_validation_rows: int | None = MISSING
    """Keep at most this many validation rows, drawn by `seed`; null keeps all."""
    seed: int = MISSING
    """Decides the split and the rows that `max_rows` keeps."""
    system_prompt: str | None = MISSING
    """Stands before every question that brings no system message of its own; null for none."""
    standardise: bool = MISSING
    """Normalise Unicode to NFC, line ends, white space and HTML entities, and remove control characters."""
    ties: str = MISSING
    """A row whose chosen answer equals the rejected one: `drop` it (counted) or make it an `error`."""
    duplicates: str = MISSING
    """A row seen before, or nearly so: `drop` it (counted), `keep` it, or make it an `error`."""
    near_duplicate: float = MISSING
    """From this similarity on two texts count as the same: the share of words and neighbouring words they have in common
    (Jaccard), more than 0 and up to 1. Such questions never stand on two sides of a split."""

    def __post_init__(self) -> None:
        paths = list(self.path) if isinstance(self.path, (list, dict)) else [self.path]
        require(
            bool(paths) and all(isinstance(path, str) and path for path in paths),
            "data.path", self.path, "name a file, a folder, a hub dataset, a list of these, or a mapping to weights",
        )  # fmt: skip
        for path, weight in self.weights.items():
            require(
                isinstance(weight, (int, float)) and not isinstance(weight, bool) and weight > 0,
                f"data.path.{path}", weight, "use a weight of more than 0, such as 2 or 0.5",
            )  # fmt: skip
        for key, size in (("validation_size", self.validation_size), ("test_size", self.test_size)):
            require(size >= 0, f"data.{key}", size, "use a share below 1 or a number of rows")
            require(size < 1 or size == int(size), f"data.{key}", size, "use a share below 1 or a whole number of rows")
        shares = [size for size in (self.validation_size, self.test_size) if size < 1]
        require(sum(shares) < 1, "data.validation_size + data.test_size", sum(shares), "leave rows to train on")
        for key, rows in (("max_rows", self.max_rows), ("max_validation_rows", self.max_validation_rows)):
            require(rows is None or rows >= 1, f"data.{key}", rows, "use 1 or more, or null for all")
        one_of("data.ties", self.ties, ("drop", "error"))
        one_of("data.duplicates", self.duplicates, ("drop", "keep", "error"))
        require(0 < self.near_duplicate <= 1, "data.near_duplicate", self.near_duplicate, "use more than 0 and up to 1")

    @property
    def weights(self) -> dict[str, float]:
        """How often each training row of each path is used."""
        if isinstance(self.path, dict):
            return self.path
        return dict.fromkeys([self.path] if isinstance(self.path, str) else self.path, 1)
