"""A folder that is written whole or not at all, and never over what somebody else wrote. Imports no torch."""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fitness_dpo.config import InputError

MARK = "export.json"


@contextmanager
def new_folder(folder: Path, mark: dict[str, Any]) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end; after an error nothing of it is left.

    `mark` is written into it as export.json. A folder that is there already is replaced only if its own mark names the
    same run. Raises InputError where it holds anything else, cannot be written, or the disk runs full.
    """
    require_own(folder, mark)
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise InputError(f"output={folder}: no folder can be made there ({error.strerror}); name another") from error
    try:
        yield beside
        (beside / MARK).write_text(json.dumps(mark, indent=1), encoding="utf-8")
        beside.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full_error(error):
            raise
        raise InputError(f"output={folder}: its disk ran full, nothing was kept; make room, or name another") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()


def require_own(folder: Path, mark: dict[str, Any]) -> None:
    """Raise InputError unless `folder` is absent, empty, or an earlier export of the same run."""
    if folder.is_file():
        raise InputError(f"output={folder}: a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    file = folder / MARK
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("run_id") is None or found["run_id"] != mark["run_id"]:
        raise InputError(f"output={folder}: holds what is no export of this run; name another folder, or empty it")


def require_room(folder: Path, needed_bytes: int) -> None:
    """Raise InputError unless the disk that `folder` is to be on has `needed_bytes` free."""
    there = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise InputError(
            f"output={folder}: needs {needed_bytes / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free; "
            "free some, or name a folder on another disk"
        )


def is_full_error(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
