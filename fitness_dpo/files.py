"""Files -> rows: JSON, JSON lines, CSV, TSV and Parquet, plain or gzipped, told apart by content. Imports no torch."""

import codecs
import contextlib
import csv
import gzip
import importlib.resources
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fitness_dpo.config import InputError
from fitness_dpo.formats import has_one_answer, plain_key, recognise

EMBEDDED = "fitness_qa"
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
HUB_TIMEOUT_SECONDS = 5


class Place(NamedTuple):
    """Where a row stands, for people: `pairs.jsonl line 12`."""

    file: str
    row: str

    def __str__(self) -> str:
        return f"{self.file} {self.row}"


def read_rows(path: str) -> Iterator[tuple[Place, Any]]:
    """Every row of a file, a folder of files, a hub dataset or the embedded set, with where it stands.

    Raises InputError for a file that is missing, empty, damaged or of another kind.
    """
    files = data_files(path)
    if files is None:
        yield from some_rows(path, read_hub_rows(path))
    for name, file in files or []:
        try:
            yield from some_rows(name, parse_rows(name, file.read_bytes()))
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def some_rows(name: str, rows: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Any]]:
    """The rows themselves. Raises InputError where there is none: one empty file among several must not pass unseen."""
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise InputError(f"{name}: holds no rows; give some, or leave it out")


def data_files(path: str) -> list[tuple[str, Traversable]] | None:
    """The name and the file of everything `path` stands for; None for a hub dataset."""
    if path == EMBEDDED:
        inside = importlib.resources.files("fitness_dpo.fitness_qa").iterdir()
        rows = [file for file in inside if file.name.endswith(".json") and file.name != "facts.json"]
        return [(f"{EMBEDDED}/{file.name}", file) for file in sorted(rows, key=lambda file: file.name)]
    here = Path(path).expanduser()
    if here.is_dir():
        files = sorted(file for file in here.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise InputError(f"data.path={path}: no {', '.join(SUFFIXES)} file in this folder; name another")
        return [(str(file), file) for file in files]
    if here.is_file():
        return [(path, here)]
    if HUB_ID.fullmatch(path) and not path.endswith(SUFFIXES):
        return None
    raise InputError(f"data.path={path}: no such file; check the path, or name a hub dataset as org/name")


def read_hub_rows(name: str) -> Iterator[tuple[Place, Any]]:
    """The rows of `org/name`, or of its subset `org/name:subset`, each with the split it stands in. HF_HUB_OFFLINE=1 takes the copy
    that an earlier load left in the hub's cache."""
    import datasets
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    repository, _, subset = name.partition(":")
    try:
        with contextlib.suppress(OfflineModeIsEnabled):
            HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_SECONDS)  # load_dataset would try for half a minute
        splits = datasets.load_dataset(repository, subset or None)
    except (
        HfHubHTTPError,
        HFValidationError,
        httpx.HTTPError,
        ConnectionError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        raise InputError(
            f"data.path={name}: neither a file here nor reachable on the hub ({type(error).__name__}); check the name and the "
            "network, or give a file (HF_HUB_OFFLINE=1 takes a cached copy)"
        ) from error
    except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(
            f"data.path={name}: the hub's dataset cannot be read ({reason}); choose a subset with data.path={repository}:SUBSET, "
            "or fetch its files and give them"
        ) from error
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            yield Place(name, f"{split} row {number}"), ({"split": split, **row} if len(splits) > 1 else row)


def parse_rows(name: str, content: bytes) -> Iterable[tuple[Place, Any]]:
    """The rows of one file's content. Raises InputError, or UnicodeDecodeError for text that is not UTF-8."""
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{name}: the gzip file is damaged ({error}); fetch it again") from error
    if content.startswith(b"PAR1"):
        return parquet_rows(name, content)
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"{name}: a Git LFS pointer, not the data itself; run git lfs pull")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: UTF-16 text; save it as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    first = re.search(rb"\S", content)
    if first is None:
        raise InputError(f"{name}: the file is empty; give one with rows")
    return json_rows(name, content) if first[0] in b"[{" else table_rows(name, content.decode())


def decode(text: bytes) -> Any:
    """One JSON value. What the strict, fast decoder refuses (NaN, half a surrogate pair) the standard one may take."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return json.loads(text.decode())


def json_rows(name: str, content: bytes) -> Iterable[tuple[Place, Any]]:
    """Rows of a JSON list, of an object that holds one, or of JSON lines."""
    try:
        whole = decode(content)
    except json.JSONDecodeError as error:
        return line_rows(name, content, error)
    if isinstance(whole, dict):
        keys = {plain_key(key): value for key, value in whole.items()}
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = [whole] if recognise(keys) or has_one_answer(keys) or not lists else max(lists, key=len)
    return ((Place(name, f"row {number}"), row) for number, row in enumerate(whole, 1))


def line_rows(name: str, content: bytes, as_json: json.JSONDecodeError) -> Iterator[tuple[Place, Any]]:
    rows = 0
    for number, line in enumerate(io.BytesIO(content), 1):
        if line.isspace():
            continue
        place = Place(name, f"line {number}")
        try:
            row = decode(line)
        except UnicodeDecodeError as error:
            raise InputError(f"{place}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            if not rows:
                raise InputError(f"{name} line {as_json.lineno}: not JSON ({as_json.msg}); mend the file") from error
            raise InputError(f"{place}: not JSON ({error.msg}); mend or remove the line") from error
        rows += 1
        yield place, row


def table_rows(name: str, text: str) -> Iterator[tuple[Place, Any]]:
    """Rows of comma-, semicolon- or tab-separated text whose first line names the columns."""
    first_line = text.lstrip().partition("\n")[0]
    delimiter = max("\t,;", key=first_line.count)
    if delimiter not in first_line:
        raise InputError(f"{name} line 1: not JSON, JSON lines, CSV, TSV or Parquet; give one of these")
    reader = csv.DictReader(io.StringIO(text.lstrip(), newline=""), delimiter=delimiter)
    try:
        columns = reader.fieldnames or []
        if any(len(column) > 60 or column.isdecimal() for column in columns):
            raise InputError(f"{name}: its first line holds data; put one with the names of the columns before it")
        for row in reader:
            place = Place(name, f"line {reader.line_num}")
            if None in row:
                raise InputError(
                    f"{place}: has more cells than columns; put quotes round text with {delimiter!r} in it"
                )
            yield place, row
    except csv.Error as error:
        raise InputError(f"{name} line {reader.line_num}: {error}; mend the line") from error


def parquet_rows(name: str, content: bytes) -> Iterator[tuple[Place, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        number = 0
        for batch in table.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield Place(name, f"row {number}"), row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{name}: damaged Parquet ({str(error).splitlines()[0]}); fetch it again") from error
