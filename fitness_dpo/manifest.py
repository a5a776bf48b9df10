"""A folder that is known to be whole: sha256.json, written last, names every file in it with its hash. Imports no torch."""

import hashlib
import json
from pathlib import Path

MANIFEST = "sha256.json"


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the hashes of all files in `folder`. Until then it is not whole."""
    hashes = {file.name: sha256(file) for file in folder.iterdir() if file.is_file() and file.name != MANIFEST}
    beside = folder / f".{MANIFEST}"
    beside.write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    beside.replace(folder / MANIFEST)


def is_whole(folder: Path) -> bool:
    """Whether `folder` was sealed and each of its files is still what it was."""
    try:
        hashes: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(sha256(folder / Path(name).name) == known for name, known in hashes.items())
    except (OSError, ValueError, AttributeError):
        return False
