"""The judge against real servers: one that limits, hangs and babbles, and (slow) transformers serve with the embedded model."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from fitness_dpo.config import InputError, JudgeConfig
from fitness_dpo.items import Items
from fitness_dpo.judge import Judge, Missing, at_equal_length, judge_all, judgement, length_controlled, parse
from fitness_dpo.weights import locate

QUESTIONS = [
    {"id": f"q{place}", "prompt": f"Question {place}?", "reference": "Rest.", "base": base, "tuned": tuned}
    for place, (base, tuned) in enumerate(
        [("bad", "good good"), ("good", "bad bad"), ("same", "same"), ("bad and long indeed", "good")]
    )
]


def reply(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}).encode()


def fair(request: dict[str, Any]) -> str:
    """Prefers the answer that says good; neither where both do or do not."""
    first, second = request["messages"][1]["content"].split("Answer A:\n")[1].split("\n\nAnswer B:\n")
    better = {(True, False): "A", (False, True): "B"}.get(("good" in first, "good" in second), "TIE")
    return f"One of them is right.\nVERDICT: {better}"


@contextmanager
def server(*faults: str, talk: Callable[[dict[str, Any]], str] = fair) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint's address and the requests it got. It commits each of `faults` once, in order, then answers."""
    left, requests, done = list(faults), [], threading.Event()  # type: tuple[list[str], list[dict[str, Any]], threading.Event]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(
                200, b'{"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]}'
            )

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            fault = left.pop(0) if left else ""
            if fault == "hang":
                done.wait(30)
                self.close_connection = True
            elif fault.isdigit():
                self.send(int(fault), b'{"error": {"message": "not now"}}', Retry_After="0.05")
            elif fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                self.send(200, reply("Both have their merits." if fault == "babble" else talk(request)))

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", requests
    finally:
        done.set()
        running.shutdown()
        running.server_close()
        thread.join()


def settings(url: str, **changed: Any) -> JudgeConfig:
    given = {
        "url": url, "model": None, "timeout_seconds": 3, "retries": 5, "backoff_seconds": 0.0, "max_new_tokens": 64,
    }  # fmt: skip
    return JudgeConfig(**given | changed)


def judged(judge: Judge, folder: Path) -> dict[str, Any]:
    items = Items(folder, {})
    return judgement(QUESTIONS, items, judge_all(judge, QUESTIONS, items, lambda: None))


def test_every_fault_is_retried_and_counted_and_changes_no_verdict(tmp_path: Path) -> None:
    with server() as (url, _):
        calm = judged(Judge(settings(url)), tmp_path / "calm")
    with server("429", "hang", "babble", "503", "drop") as (url, requests):
        stormy = judged(Judge(settings(url)), tmp_path / "stormy")
    assert stormy.pop("retried") == {"rate limit": 1, "time-out": 1, "malformed": 1, "server error": 1, "connection": 1}
    assert calm.pop("retried") == {}
    assert calm == stormy
    assert len(requests) == 8 + 5
    assert (calm["win_rate"]["value"], calm["ties"], calm["missing"]) == (0.625, 2, 0)
    assert calm["same_in_both_orders"] == 1.0


def test_a_verdict_that_does_not_come_is_missing_and_asked_for_again_later(tmp_path: Path) -> None:
    with server("babble", "babble") as (url, requests):
        first = judged(Judge(settings(url, retries=1)), tmp_path)
        assert (first["missing"], first["verdicts"], first["judged_in_both_orders"]) == (1, 7, 3)
        assert first["retried"] == {"malformed": 2}
        assert [len(request["messages"]) for request in requests[:2]] == [2, 4], "it is told what was wrong"
        second = judged(Judge(settings(url, retries=1)), tmp_path)
    assert (second["missing"], second["win_rate"]["value"]) == (0, 0.625)
    assert len(requests) == 2 + 7 + 1


def test_a_judge_that_prefers_the_first_answer_decides_nothing(tmp_path: Path) -> None:
    with server(talk=lambda request: "VERDICT: A") as (url, _):
        scores = judged(Judge(settings(url)), tmp_path)
    assert scores["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert scores["same_in_both_orders"] == 0.0


def test_the_judge_sees_the_reference_and_both_orders(tmp_path: Path) -> None:
    with server() as (url, requests):
        judged(Judge(settings(url)), tmp_path)
    first, second = (request["messages"][1]["content"] for request in requests[:2])
    assert "Reference answer:\nRest." in first
    assert "Answer A:\ngood good\n\nAnswer B:\nbad" in first
    assert "Answer A:\nbad\n\nAnswer B:\ngood good" in second


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A is wrong on protein.\nVERDICT: B", "B"), ("**Verdict: tie**", "TIE"), ("VERDICT: A.", "A"),
        ("VERDICT: A or B", None), ("VERDICT: A\nBut B is fine too.", None), ("", None), ("B", None),
    ],
)  # fmt: skip
def test_only_a_plain_verdict_counts(text: str, expected: str | None) -> None:
    assert parse(text) == expected


def test_an_endpoint_that_is_not_there_or_refuses() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="nothing answers there; start the server"):
            Judge(settings(f"http://127.0.0.1:{unused.getsockname()[1]}/v1"))
    with server("401") as (url, _), pytest.raises(InputError, match=r"refused with 401 .* set OPENAI_API_KEY"):
        Judge(settings(url)).compare("q", "r", "a", "b")
    with server(*["hang"] * 2) as (url, _):
        began = time.monotonic()
        missing = Judge(settings(url, timeout_seconds=0.2, retries=1)).compare("q", "r", "a", "b")
        assert missing == Missing(["time-out", "time-out"])
        assert time.monotonic() - began < 20, "a server that hangs does not hang us"


def test_length_is_taken_out_of_the_win_rate() -> None:
    """A judge that only likes length: the longer tuned answers win, and at equal length neither does."""
    longer = np.random.default_rng(0).normal(1.0, 1.0, 400)
    by_length = (np.random.default_rng(1).random(400) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(
        float
    )
    assert by_length.mean() > 0.65
    assert length_controlled(by_length, longer)["value"] == pytest.approx(0.5, abs=0.08)
    by_merit = (np.random.default_rng(2).random(400) < 0.8).astype(float)
    assert length_controlled(by_merit, longer)["value"] == pytest.approx(0.8, abs=0.05)
    assert length_controlled(np.ones(5), np.arange(5.0))["value"] > 0.98


def test_the_regression_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    feature, outcome = np.tanh(draw.normal(size=(2, 40))), draw.integers(0, 3, (2, 40)) / 2
    for own, row, won in zip(at_equal_length(outcome, feature), feature, outcome, strict=True):
        theirs = LogisticRegression(tol=1e-8).fit(
            np.concatenate([row, row])[:, None], np.repeat([1, 0], 40), np.concatenate([won, 1 - won])
        )
        assert own == pytest.approx(1 / (1 + np.exp(-theirs.intercept_[0])), abs=1e-3)


@pytest.mark.slow
def test_transformers_serve_with_the_embedded_model(tmp_path: Path) -> None:
    """A real server and a weak judge: whatever it says, each comparison ends as a verdict or is counted as missing."""
    folder = locate("embedded:smollm2-135m-instruct", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        serving = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            judge = wait_for(f"http://127.0.0.1:{port}/v1", folder, serving)
            scores = judged(judge, tmp_path / "judge")
        finally:
            serving.terminate()
            serving.wait()
    counted = Counter(scores["retried"])
    assert scores["verdicts"] + scores["missing"] == 8
    assert set(counted) <= {"malformed"}, (tmp_path / "log").read_text()


def wait_for(url: str, model: str, serving: "subprocess.Popen[bytes]") -> Judge:
    for _ in range(240):
        try:
            return Judge(settings(url, model=model, timeout_seconds=120, retries=0, max_new_tokens=8))
        except InputError:
            assert serving.poll() is None, "the server ended"
            time.sleep(0.5)
    raise AssertionError("the server did not start")
