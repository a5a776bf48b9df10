"""Where a server listens. Imports no torch."""

import importlib.util
import socket

from fitness_dpo.config import InputError


def require_free(host: str, port: int) -> None:
    """Raise InputError unless a server can listen at `host` and `port`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except socket.gaierror as error:
        raise InputError(
            f"host={host}: no such address ({error.strerror}); use 127.0.0.1, or 0.0.0.0 for all"
        ) from error
    except OSError as error:
        raise InputError(
            f"port={port}: {host} does not give it ({error.strerror}); use another, such as port={port + 1}"
        ) from error


def require_installed(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{package} is not installed; pip install {package}, or this project with its extra [{extra}]")
