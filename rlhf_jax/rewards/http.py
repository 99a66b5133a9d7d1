"""Scores from a server: POST {"prompts": [...], "responses": [...], "finished": [...], "columns": {...}} -> {"scores": [...]}.

The answer may also be the bare list. A failure is never a score: after bounded retries the run stops with a message. A server
that asks who is calling gets the token in the environment variable RLHF_JAX_REWARD_TOKEN; a run file is no place for one.
"""

import contextlib
import functools
import http.client
import json
import math
import os
import random
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError, without_secrets
from rlhf_jax.rewards.check import RewardError, checked, shorten
from rlhf_jax.types import RewardInput

CONNECT_S = 10.0
RETRIES = 3
BACKOFF_S = 0.5  # doubled at each retry, with jitter
BODY_LIMIT = 16 << 20  # bytes
RETRIED = (408, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3


class _Retry(RuntimeError):
    """A failure that may pass."""


def http_reward(
    url: str, *, timeout_s: float = 60.0, sleep: Callable[[float], None] = time.sleep
) -> Callable[[RewardInput], np.ndarray]:
    """A reward function that asks a server.

    `timeout_s` bounds one attempt as a whole, once it is connected; the call takes at most 4 attempts and 3.5 s of pauses (half
    as much again with jitter). Errors: `UserError` for a bad URL or token, `RewardError` for a server that fails.
    """
    try:
        _address(url)
    except ValueError:
        raise UserError(
            f"reward.url: {_shown(url)!r} must be http://host[:port]/path or https://…, in ASCII, without a password in it"
        ) from None
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token := os.environ.get("RLHF_JAX_REWARD_TOKEN", "").strip():
        if not (token.isascii() and token.isprintable()):  # http.client would print it
            raise UserError("RLHF_JAX_REWARD_TOKEN (not shown) holds what is no printable ASCII; set it anew, on one line")
        headers["Authorization"] = f"Bearer {token}"
    return functools.partial(_ask, url, headers, timeout_s, sleep)


def _address(url: str, base: str = "") -> urllib.parse.SplitResult:
    """The parts of an address, read from `base`. Errors: `ValueError` for one that no server can be asked at."""
    parts = urllib.parse.urlsplit(urllib.parse.urljoin(base, url))
    whole = parts.geturl()
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or parts.port == 0:
        raise ValueError("not HTTP, no host, a password or port 0")
    if not (whole.isascii() and whole.isprintable()) or " " in whole:
        raise ValueError("characters that must be encoded")
    parts.hostname.encode("idna")  # no empty or endless labels
    return parts


def _ask(url: str, headers: dict[str, str], timeout_s: float, sleep: Callable[[float], None], batch: RewardInput) -> np.ndarray:
    finished = np.asarray(batch.finished, bool).tolist()
    request = {"prompts": batch.prompts, "responses": batch.responses, "finished": finished, "columns": _strict(batch.columns)}
    body = json.dumps(request, default=str).encode()
    jitter = random.Random(len(body))  # noqa: S311  (spreads retries; not a secret)
    for attempt in range(RETRIES + 1):
        try:
            raw = _post(url, headers, body, timeout_s)
        except _Retry as error:
            if attempt == RETRIES:
                raise RewardError(
                    f"reward.url: {_shown(url)}: {error}, {RETRIES + 1} attempts; start the server, or raise reward.timeout_s"
                ) from None
            sleep(BACKOFF_S * 2**attempt * (1.0 + 0.5 * jitter.random()))
        else:
            return _scores(raw, url, batch)
    raise AssertionError("unreachable")


def _strict(value: Any) -> Any:
    """NaN and infinities, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scores(raw: bytes, url: str, batch: RewardInput) -> np.ndarray:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise RewardError(
            f'reward.url: {_shown(url)}: the answer is not JSON: {raw[:60]!r}; expected {{"scores": [numbers]}}'
        ) from None
    scores = value.get("scores") if isinstance(value, dict) else value
    if not isinstance(scores, list):
        raise RewardError(f'reward.url: {_shown(url)}: the answer has no list of scores; expected {{"scores": [numbers]}}')
    return checked(scores, len(batch.responses), f"url {_shown(url)}", batch.prompts)


def _post(url: str, headers: dict[str, str], body: bytes, timeout_s: float) -> bytes:
    """One attempt: follows redirects on the same host only. Raises `_Retry` for what may pass, else `RewardError`."""
    first = parts = _address(url)
    for _ in range(_MAX_REDIRECTS + 1):
        status, location, raw = _exchange(parts, headers, body, timeout_s)
        if status in _REDIRECTS:
            try:
                parts = _address(location or "", parts.geturl())
                same = (parts.scheme, parts.hostname, parts.port) == (first.scheme, first.hostname, first.port)
            except ValueError:
                same = False
            if not same:
                where = shorten(_shown(location or ""))
                raise RewardError(f"reward.url: {first.hostname} redirects to another host, or to no address: {where}; refused")
            continue
        if status in RETRIED:
            raise _Retry(f"HTTP {status}")
        if status != 200:
            raise RewardError(f"reward.url: {_shown(parts.geturl())}: HTTP {status}: {raw[:80]!r}; not tried again")
        return raw
    raise RewardError(f"reward.url: {_shown(url)}: more than {_MAX_REDIRECTS} redirects")


def _exchange(
    parts: urllib.parse.SplitResult, headers: dict[str, str], body: bytes, timeout_s: float
) -> tuple[int, str | None, bytes]:
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = make(parts.hostname or "", parts.port, timeout=CONNECT_S)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    over = threading.Event()
    late = threading.Timer(timeout_s, _hang_up, (connection, over))  # for headers that trickle in, byte by byte
    late.daemon = True
    try:
        connection.connect()
        deadline = time.monotonic() + timeout_s
        connection.sock.settimeout(timeout_s)
        late.start()
        connection.request("POST", target, body, headers)
        with connection.getresponse() as response:
            answer = response.status, response.getheader("Location"), _limited(response, connection.sock, deadline)
        if over.is_set():  # what was there when the line went dead may look whole
            raise TimeoutError("the answer took too long")
        return answer
    except (TimeoutError, ConnectionError, socket.gaierror, http.client.HTTPException, OSError) as error:
        if over.is_set():  # the line was not lost, it was hung up
            raise _Retry("TimeoutError: the answer took too long") from None
        raise _Retry(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from None
    finally:
        late.cancel()
        connection.close()


def _hang_up(connection: http.client.HTTPConnection, over: threading.Event) -> None:
    over.set()
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def _limited(response: http.client.HTTPResponse, sock: Any, deadline: float) -> bytes:
    """The body, at most BODY_LIMIT bytes, before the deadline even when it trickles in."""
    blocks, size = [], 0
    while block := response.read1(1 << 16):
        size += len(block)
        if size > BODY_LIMIT:
            raise RewardError(f"reward.url: the answer is larger than {BODY_LIMIT >> 20} MB; send one number a sample")
        blocks.append(block)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        if sock is not None and sock.fileno() >= 0:
            sock.settimeout(left)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(blocks)


def _shown(url: str) -> str:
    """A URL, whole or not, for messages: without query and password, which may hold secrets."""
    return without_secrets(re.split("[?#]", url)[0])
