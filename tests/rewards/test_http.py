"""A reward server that is down, slow, wrong, huge or elsewhere: bounded retries, then one message."""

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from rlhf_jax.config import Reward
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import RewardError, http_reward, make_reward
from rlhf_jax.types import RewardInput

BATCH = RewardInput(
    ["p0", "p1"], ["r0 é", "r1"], np.asarray([True, False]), {"answer": [1, "x"], "x": [math.nan, {"y": [math.inf]}]}
)


class Server:
    """Answers each request with the next of a list of (status, headers, body); the last repeats."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.requests: list[tuple[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.delay_s = self.trickle_s = 0.0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                owner.requests.append((self.path, json.loads(body)))
                owner.authorizations.append(self.headers["Authorization"])
                status, headers, answer = owner.answers[min(len(owner.requests), len(owner.answers)) - 1]
                time.sleep(owner.delay_s)
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                try:
                    if not owner.trickle_s:
                        self.wfile.write(answer)
                    else:
                        for byte in answer:
                            self.wfile.write(bytes([byte]))
                            time.sleep(owner.trickle_s)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *arguments: Any) -> None:
                del arguments

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score?key=secret"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def gives(self, *answers: tuple[int, Any]) -> None:
        self.answers = [(status, {}, body if isinstance(body, bytes) else json.dumps(body).encode()) for status, body in answers]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def _ask(server: Server, pauses: list[float] | None = None, timeout_s: float = 5.0) -> list[float]:
    return http_reward(server.url, timeout_s=timeout_s, sleep=[].append if pauses is None else pauses.append)(BATCH).tolist()


def test_scores_and_what_is_sent(server: Server):
    server.gives((200, {"scores": [1, -2.5]}))
    assert _ask(server) == [1.0, -2.5]
    path, sent = server.requests[0]
    assert path == "/score?key=secret"
    assert sent == {
        "prompts": ["p0", "p1"],
        "responses": ["r0 é", "r1"],
        "finished": [True, False],
        "columns": {"answer": [1, "x"], "x": [None, {"y": [None]}]},
    }
    server.gives((200, [3, True]))
    assert _ask(server) == [3.0, 1.0]
    server.gives((200, [3, 4]))
    total, parts = make_reward(Reward(url=server.url, url_weight=0.5))(BATCH)
    assert total.tolist() == [1.5, 2.0]
    assert parts["reward/url"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_failures_that_may_pass_are_tried_again(server: Server, status: int):
    server.gives((status, "x"), (status, "x"), (status, "x"), (200, [1, 2]))
    pauses: list[float] = []
    assert _ask(server, pauses) == [1.0, 2.0]
    assert len(pauses) == 3
    assert all(0.5 * 2**n <= pause <= 0.75 * 2**n for n, pause in enumerate(pauses))


def test_retries_are_bounded_and_never_a_zero(server: Server):
    server.gives((500, "x"))
    with pytest.raises(RewardError, match="HTTP 500, 4 attempts") as caught:
        _ask(server)
    assert len(server.requests) == 4
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 501])
def test_failures_that_stay_are_not_tried_again(server: Server, status: int):
    server.gives((status, "what went wrong"))
    with pytest.raises(RewardError, match=rf"HTTP {status}: .*what went wrong.*not tried again"):
        _ask(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "piece"),
    [
        (b"<html>hello</html>", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"scores": [1, NaN]}', "sample 1 got nan"),
        (b'{"scores": [1, Infinity]}', "sample 1 got inf"),
        ({"scores": [1, None]}, "sample 1 got None"),
        ({"scores": [1, "2"]}, "sample 1 got '2'"),
        ({"scores": [1]}, "returned 1 values for 2 samples"),
        ({"rewards": [1, 2]}, "no list of scores"),
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ("text", "no list of scores"),
    ],
)
def test_answers_that_are_no_scores(server: Server, body: Any, piece: str):
    server.gives((200, body))
    with pytest.raises(RewardError, match=piece):
        _ask(server)
    assert len(server.requests) == 1


def test_a_server_that_is_down(server: Server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(RewardError, match=r"Connection.*4 attempts; start the server"):
        _ask(server)


def test_a_slow_server(server: Server):
    server.gives((200, [1, 2]))
    server.delay_s = 1.0
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"[Tt]ime.*4 attempts"):
        _ask(server, timeout_s=0.05)
    assert time.monotonic() - begun < 5


def test_a_body_that_never_ends_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlhf_jax.rewards.http.BODY_LIMIT", 1 << 16)
    server.answers = [(200, {"Content-Length": str(1 << 30)}, b"[" + b"1," * (1 << 17))]
    with pytest.raises(RewardError, match="larger than"):
        _ask(server)


def test_a_body_that_trickles_in_is_cut_off(server: Server):
    server.gives((200, [1.0] * 500))
    server.trickle_s = 0.01  # each wait is short, the whole would take seconds
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"took too long.*4 attempts"):
        _ask(server, timeout_s=0.1)
    assert time.monotonic() - begun < 5


def test_headers_that_trickle_in_are_cut_off():
    def trickle(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                    while True:
                        connection.sendall(b"x")
                        time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = threading.Thread(target=trickle, args=(listener,), daemon=True)
        sender.start()
        begun = time.monotonic()
        with pytest.raises(RewardError, match="4 attempts"):
            http_reward(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.1, sleep=[].append)(BATCH)
        assert time.monotonic() - begun < 5
        listener.shutdown(socket.SHUT_RDWR)
        sender.join()


def test_the_token_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch):
    server.gives((200, [1, 2]))
    _ask(server)
    monkeypatch.setenv("RLHF_JAX_REWARD_TOKEN", "t0ken")
    _ask(server)
    monkeypatch.setenv("RLHF_JAX_REWARD_TOKEN", "t0ken\n")  # as `$(cat file)` does not, but others do
    _ask(server)
    assert server.authorizations == [None, "Bearer t0ken", "Bearer t0ken"]
    for token in ("t0\nken", "t0kén"):
        monkeypatch.setenv("RLHF_JAX_REWARD_TOKEN", token)
        with pytest.raises(UserError, match=r"RLHF_JAX_REWARD_TOKEN .* no printable ASCII") as caught:
            _ask(server)
        assert "t0" not in str(caught.value)


def test_a_body_that_breaks_off_is_tried_again(server: Server):
    server.answers = [(200, {"Content-Length": "100"}, b"[1"), (200, {}, b"[1, 2]")]
    assert _ask(server) == [1.0, 2.0]


def test_redirects_stay_on_the_host(server: Server):
    server.answers = [(307, {"Location": "/other"}, b""), (200, {}, b"[1, 2]")]
    assert _ask(server) == [1.0, 2.0]
    assert [path for path, _ in server.requests] == ["/score?key=secret", "/other"]
    strange = ("http://[::1", "http://127.0.0.1:99999/", "/é", "/a b", "http://" + "x" * 64 + "/")
    for target in ("http://example.org/", "http://localhost:1/", "file:///etc/passwd", "https://127.0.0.1/", *strange):
        server.requests.clear()
        server.answers = [(302, {"Location": target}, b"")]
        with pytest.raises(RewardError, match="redirects to another host"):
            _ask(server)
    server.requests.clear()
    server.answers = [(302, {"Location": "/again"}, b"")]
    with pytest.raises(RewardError, match="more than 3 redirects"):
        _ask(server)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "ftp://host/x",
            "host:80",
            "file:///etc/passwd",
            "http://",
            "http://user:pass@host/",
            "http://h:93110/x",
            "http://h:x/",
        ),
        *("http://h:0/", "http://[::1/x", "http://h/é", "http://h/a b", "http://a..b/", "http://user:pass@host:x/"),
    ],
)
def test_bad_urls(url: str):
    with pytest.raises(UserError, match=r"reward\.url: .* must be http") as caught:
        http_reward(url)
    assert "pass@" not in str(caught.value)
