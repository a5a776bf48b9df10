"""Where a model's weights are: a local folder, the hub, or one of the two embedded models. Imports torch only to convert."""

import fcntl
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from fitness_dpo.config import InputError
from fitness_dpo.manifest import is_whole, seal
from fitness_dpo.smollm2 import convert_smollm2

EMBEDDED_PREFIX = "embedded:"
HUB_TIMEOUT_SECONDS = 5


def cache_folder() -> Path:
    """FITNESS_DPO_CACHE, or fitness_dpo under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fitness_dpo"
    return Path(os.environ.get("FITNESS_DPO_CACHE") or default)


def locate(name: str, revision: str | None) -> str:
    """What `from_pretrained` takes for `model.name`: a folder with the weights, or a hub id known to be there.

    Raises InputError within HUB_TIMEOUT_SECONDS or so when the weights can't be had, before anything heavy is imported.
    """
    if name.startswith(EMBEDDED_PREFIX):
        builders = {  # the folder's name changes whenever what is written into it does
            "smollm2-135m-instruct": ("smollm2-135m-instruct-3", convert_smollm2),
            "tiny": ("tiny", build_tiny),
        }
        known = builders.get(name.removeprefix(EMBEDDED_PREFIX))
        if known is None:
            raise InputError(f"model.name={name}: choose one of {', '.join(EMBEDDED_PREFIX + key for key in builders)}")
        return str(cached(*known))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.name={name}: no config.json in this folder; name a folder with a whole model")
        if not any(folder.glob("*.safetensors")):
            raise InputError(
                f"model.name={name}: no *.safetensors in this folder; pickled weights can run code and are never loaded, convert them"
            )
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model.name={name}: no such folder; check the path")
    require_on_hub(name, revision)
    return name


def require_on_hub(name: str, revision: str | None) -> None:
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except HFValidationError as error:
        raise InputError(f"model.name={name}: neither a folder nor a hub id; check the name") from error
    except LocalEntryNotFoundError:
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
        except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError) as error:
            raise InputError(
                f"model.name={name}: neither cached nor reachable on the hub ({type(error).__name__}); check the name and "
                "the network (HF_ENDPOINT names a mirror, a local folder works too), or take the embedded model with model=smollm2_135m"
            ) from error


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, built once however many processes ask at once, its files checked by SHA-256."""
    folder = cache_folder() / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}."))
            try:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
                    apart.submit(build, beside).result()  # transformers must not be imported here before unsloth is
                seal(beside)
                beside.rename(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_tiny(folder: Path) -> None:
    """Write a Llama of random weights, a few hundred kB, with a byte-level tokenizer and the ChatML template. For tests."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=special, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
