"""An export -> a repository on the Hugging Face hub. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from fitness_dpo.config import HubConfig, InputError
from fitness_dpo.weights import HUB_TIMEOUT_SECONDS


def require_open(config: HubConfig) -> None:
    """Raise InputError unless the hub can be reached, knows us, and would keep the upload as private as asked."""
    api = HfApi()
    with one_line(config):
        api.whoami()
        try:
            known = api.model_info(config.repo or "", timeout=HUB_TIMEOUT_SECONDS)
        except RepositoryNotFoundError:
            return
    if config.private and not known.private:
        raise InputError(f"hub.repo={config.repo}: is there and public; set hub.private=false, or name another")


def upload(folder: Path, config: HubConfig) -> str:
    """The address of the repository that now holds `folder`."""
    api = HfApi()
    with one_line(config):
        address = api.create_repo(config.repo or "", private=config.private, exist_ok=True)
        api.upload_folder(repo_id=config.repo or "", folder_path=folder, commit_message="Upload the tuned model")
    return str(address)


@contextmanager
def one_line(config: HubConfig) -> Iterator[None]:
    """Turn what the hub's client raises into an InputError."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"hub.repo={config.repo}: no name of a repository; write owner/name") from error
    except LocalTokenNotFoundError as error:
        raise InputError(
            f"hub.repo={config.repo}: no token for the hub; log in with hf auth login, or set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        reason = str(error).splitlines()[0] or type(error).__name__
        raise InputError(
            f"hub.repo={config.repo}: the hub does not take it ({reason}); check the network, the name and the token"
        ) from error
