"""format=hub against a server that speaks the hub's API as huggingface_hub calls it, large files by Git LFS.

HF_HUB_DISABLE_XET makes the client take Git LFS: Xet, which it prefers on the hub, is a storage system of its own.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import run_verb

TOKEN = "hf_" + "secret" * 5
COMMIT = "b" * 40


class Server(ThreadingHTTPServer):
    """The hub, with one account, `me`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, bool] = {}
        """Whether each is private."""
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.refused = ""
        """The end of a path that is answered with 403."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """The test's output stays its own."""

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    do_PUT = do_POST

    def answer(self, body: bytes) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.seen.append(f"{self.command} {path}")
        stored = path.startswith("/store/")
        if not stored and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.reply({"error": "Invalid credentials"}, 401)
        elif hub.refused and path.endswith(hub.refused):
            self.reply({"error": f"Forbidden: this token may not write, {self.headers['Authorization'][:9]}"}, 403)
        elif path == "/api/whoami-v2":
            self.reply({"name": "me", "type": "user"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repositories:
                self.reply({"error": "You already created this model repo", "url": f"{self.home}/{name}"}, 409)
            else:
                hub.repositories[name] = asked["visibility"] == "private"
                self.reply({"url": f"{self.home}/{name}", "name": name, "id": "1"})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.home}/store/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif stored and hashlib.sha256(body).hexdigest() == path.removeprefix("/store/"):
            hub.large[path.removeprefix("/store/")] = body
            self.reply({})
        elif committed := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self.commit([json.loads(line) for line in body.splitlines()])
            self.reply({"commitOid": COMMIT, "commitUrl": f"{self.home}/{committed[1]}/commit/{COMMIT}"})
        elif (name := path.removeprefix("/api/models/").removesuffix("/revision/main")) in hub.repositories:
            self.reply({"id": name, "private": hub.repositories[name], "sha": COMMIT, "siblings": [], "tags": []})
        else:
            self.reply({"error": "Repository not found"}, 404, "RepoNotFound")

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]

    @property
    def home(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def reply(self, content: dict[str, Any], status: int = 200, code: str = "") -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Server]:
    server = Server()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def export(hub: Server, run: Path, home: Path, *arguments: str, token: str = TOKEN) -> tuple[int, str, str]:
    """Exit status, standard output and error of an export that may reach the hub. The token may be in no text and no file."""
    done = run_verb(
        "export", f"run={run}", f"output={home / 'model'}", "parity.max_new_tokens=4", *arguments, cwd=home,
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(home / "hf"), HF_HUB_OFFLINE="0", HF_TOKEN=token,
        HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1",
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    for folder in (home, run):
        assert not [file for file in folder.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("asked", "private"), [([], True), pytest.param(["hub.private=false"], False, marks=pytest.mark.slow)]
)
def test_an_upload_is_private_whole_and_says_nothing_of_this_machine(
    asked: list[str], private: bool, hub: Server, talker: Path, tmp_path: Path
) -> None:
    status, said, error = export(hub, talker, tmp_path, "format=hub", "hub.repo=me/bot", *asked)
    assert status == 0, error
    assert hub.repositories == {"me/bot": private}
    assert "me/bot" in said.splitlines()[-1]
    written = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert hub.files == written
    assert {"model.safetensors", "README.md", "chat_template.jinja", "tokenizer.json"} <= set(written)
    assert list(hub.large.values()) == [written["model.safetensors"]]
    for place in (tmp_path, talker.parents[3]):
        assert not [name for name, content in hub.files.items() if str(place).encode() in content]


def test_nothing_is_sent_unless_the_hub_is_named(hub: Server, talker: Path, tmp_path: Path) -> None:
    status, _, error = export(hub, talker, tmp_path, "format=merged")
    assert status == 0, error
    assert hub.seen == []


@pytest.mark.parametrize(
    ("there", "refused", "token", "reason"),
    [
        ({}, "", "hf_another", "the hub does not take it ("),
        ({"me/bot": False}, "", TOKEN, "is there and public; set hub.private=false, or name another"),
        pytest.param({}, "/commit/main", TOKEN, "the hub does not take it (", marks=pytest.mark.slow),
    ],
)
def test_an_upload_that_is_refused_ends_in_one_line(
    there: dict[str, bool], refused: str, token: str, reason: str, hub: Server, talker: Path, tmp_path: Path
) -> None:
    """Seen before anything is computed, where that can be; the export that could not be uploaded stays."""
    hub.repositories, hub.refused = dict(there), refused
    status, _, error = export(hub, talker, tmp_path, "format=hub", "hub.repo=me/bot", token=token)
    assert (status, error.count("\n")) == (2, 1), error
    assert error.startswith(f"error: hub.repo=me/bot: {reason}")
    assert (tmp_path / "model").is_dir() == bool(refused)
    assert hub.files == {}
