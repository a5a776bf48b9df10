"""conf/export.yaml: what a run is turned into, and how closely that must answer as the run does."""

from dataclasses import dataclass

from omegaconf import MISSING

from fitness_dpo.config.checks import one_of, require

FORMATS = ("merged", "gguf", "ollama", "hub")
QUANTIZATIONS = ("f16", "q8_0", "q4_k_m")
STORED_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(slots=True, kw_only=True)
class HubConfig:
    repo: str | None = MISSING
    """Where `format=hub` uploads to, as owner/name."""
    private: bool = MISSING
    """Whether a repository that the upload makes is seen by its owner alone."""


@dataclass(slots=True, kw_only=True)
class ThresholdsConfig:
    """The largest difference, in nats, between the log-probabilities that the export and the adapter give to one token of
    the adapter's answers. By what the weights are stored in."""

    float32: float = MISSING
    float16: float = MISSING
    bfloat16: float = MISSING
    f16: float = MISSING
    q8_0: float = MISSING
    q4_k_m: float = MISSING

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            require(value > 0, f"parity.thresholds.{name}", value, "use more than 0, in nats")


@dataclass(slots=True, kw_only=True)
class ParityConfig:
    """The check that the export answers as the adapter does."""

    prompts: list[str] = MISSING
    """The questions both are asked."""
    max_new_tokens: int = MISSING
    """The longest answer that is compared."""
    required: bool = MISSING
    """Refuse an export that cannot be checked here, since llama-cpp-python is not installed."""
    thresholds: ThresholdsConfig = MISSING
    kept: float = MISSING
    """How far the share of the tuning that the export carries may be from 1, beyond what rounding explains."""

    def __post_init__(self) -> None:
        require(bool(self.prompts) and all(self.prompts), "parity.prompts", self.prompts, "ask at least one question")
        require(self.max_new_tokens >= 1, "parity.max_new_tokens", self.max_new_tokens, "use 1 or more")
        require(self.kept > 0, "parity.kept", self.kept, "use more than 0, such as 0.25")


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    run: str = MISSING
    """`latest` or a run folder."""
    format: str = MISSING
    """`merged` safetensors, one `gguf` file for llama.cpp, an `ollama` folder, or an upload to the `hub`."""
    output: str | None = MISSING
    """The folder to write; null takes RUN/export/FORMAT, with the quantization where there is one."""
    base: str | None = MISSING
    """Where the base model is now: a hub id or a folder; null takes the run's model.name."""
    dtype: str = MISSING
    """What `merged` and `hub` store the weights in."""
    quantization: str = MISSING
    """What `gguf` and `ollama` store the weights in."""
    llama_cpp: str | None = MISSING
    """The folder of llama.cpp's convert_hf_to_gguf.py; null takes the one that `make llama` lays beside this Python."""
    license: str | None = MISSING
    """The model card's licence, by its SPDX name; null takes the base model's own."""
    hub: HubConfig = MISSING
    parity: ParityConfig = MISSING

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        one_of("dtype", self.dtype, STORED_DTYPES)
        one_of("quantization", self.quantization, QUANTIZATIONS)
        require(
            (self.format == "hub") == (self.hub.repo is not None),
            "hub.repo", self.hub.repo, "name the repository to upload to together with format=hub, as hub.repo=owner/name",
        )  # fmt: skip

    @property
    def stored(self) -> str:
        """What the weights are stored in: a key of the thresholds."""
        return self.quantization if self.format in ("gguf", "ollama") else self.dtype
