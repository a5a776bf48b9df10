"""A hub dataset, from a server that answers the calls of huggingface_hub and datasets as the hub does."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import PAIRS, run_verb

COMMIT = "a" * 40
REPOSITORIES = {
    "someone/pairs": {
        "README.md": b"---\nlicense: apache-2.0\n---\n# Pairs\n",
        "train.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS[:12]).encode(),
        "test.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS[12:]).encode(),
    },
    "someone/subsets": {
        "README.md": b"---\nconfigs:\n- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl\n---\n",
        "one.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS[:5]).encode(),
        "two.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS).encode(),
    },
    "someone/broken": {"README.md": b"# Broken\n", "train.jsonl": b'{"question": "a", "chosen'},
    "someone/pictures": {"README.md": b"# Nothing to read\n"},
}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """The test's output stays its own."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        name = next((name for name in REPOSITORIES if f"/datasets/{name}" in path), None)
        files = REPOSITORIES.get(name or "", {})
        asked = path.partition(f"/datasets/{name}")[2]
        if resolved := re.fullmatch(r"/resolve/\w+/(.+)", asked):
            content = files.get(resolved[1])
            if content is None:
                self.reply(b"", 404, **{"X-Error-Code": "EntryNotFound"})
            else:
                self.reply(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')  # noqa: S324
        elif name and re.fullmatch(r"(/revision/\w+)?", asked):
            siblings = [{"rfilename": file} for file in files]
            self.reply(
                json.dumps({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0}).encode()
            )
        elif name and asked.startswith("/tree/"):
            folder = asked.removeprefix(f"/tree/{COMMIT}").strip("/")
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                for file, content in files.items()
                if not folder
            ]
            self.reply(json.dumps(entries).encode())
        else:
            self.reply(b"", 404, **{"X-Error-Code": "RepoNotFound"})

    def reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a process that talks to a hub with the repositories above, its cache empty at first."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "HF_HUB_OFFLINE": "0",
    }
    server.shutdown()
    server.server_close()


READ = """
import json, sys
from fitness_dpo.config import InputError
from fitness_dpo.files import read_rows

for path in sys.argv[1:]:
    try:
        rows = [(str(place), row) for place, row in read_rows(path)]
    except InputError as error:
        rows = str(error)
    print(json.dumps(rows))
"""


def read(*paths: str, **environment: str) -> list[Any]:
    """What read_rows gives for each path in a process of its own: rows with their places, or the refusal."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_dataset_loads_with_its_splits_and_again_offline(hub: dict[str, str]) -> None:
    rows = [
        [f"someone/pairs {split} row {number}", {"split": split, **row}]
        for split, part in (("train", PAIRS[:12]), ("test", PAIRS[12:]))
        for number, row in enumerate(part)
    ]
    whole, subset, none_chosen, broken, no_rows, missing = read(
        "someone/pairs",
        "someone/subsets:one",
        "someone/subsets",
        "someone/broken",
        "someone/pictures",
        "someone/nothing",
        **hub,
    )
    assert whole == rows
    assert [row for _, row in subset] == PAIRS[:5]
    assert "['one', 'two']" in none_chosen
    assert "choose a subset with data.path=someone/subsets:SUBSET" in none_chosen
    assert "the hub's dataset cannot be read (JSON parse error" in broken
    assert "the hub's dataset cannot be read" in no_rows
    assert "neither a file here nor reachable on the hub (RepositoryNotFoundError)" in missing
    for refusal in (none_chosen, broken, no_rows, missing):
        assert "\n" not in refusal
    assert read("someone/pairs", **hub | {"HF_HUB_OFFLINE": "1"}) == [rows]


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(hub: dict[str, str], tmp_path: Path) -> None:
    done = run_verb("train", "data.path=a/b", "model=tiny", cwd=tmp_path, **hub | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 2, done.stdout
    assert re.fullmatch(r"error: data\.path=a/b: neither a file here nor reachable on the hub .*\n", done.stderr), (
        done.stderr
    )
