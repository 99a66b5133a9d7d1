"""The server, through the official client and through plain HTTP, on a free loopback port."""

import asyncio
import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import directories
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import tokenizers
import uvicorn

from rlhf_jax import cli, config, models, scorer
from rlhf_jax.data.tokenizer import load_tokenizer, make_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import http_reward
from rlhf_jax.serving import app, schema, service
from rlhf_jax.serving.answers import Reply
from rlhf_jax.streaming import Ask, Piece, Streamer, Token
from rlhf_jax.types import RewardInput

ROOT = Path(__file__).parent.parent
MESSAGES = [{"role": "user", "content": "what is 2 + 3 ?"}]
CHAT, ASKED = "chat/completions", {"messages": MESSAGES}


class Running:
    """A server in a thread, and clients of it."""

    def __init__(self, directory, name):
        self.service = app.open_service(directory, name, "127.0.0.1", 16, None, "float32", 1)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        settings = uvicorn.Config(app.make_app(self.service), log_config=None, **app.HTTP)
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)

    def http(self, method, path, body=None, **headers):
        """(status, JSON) of a plain request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, raw, {"Content-Type": "application/json"} | headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def language():
    running = Running(directories.language_model(), "tiny")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def rewarding():
    running = Running(directories.reward_model(), "tiny-reward")
    yield running
    running.stop()


def wait_until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# Answers.


def test_a_chat_streamed_and_whole(language):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 3, "n": 2, "temperature": 0.9, "top_p": 0.95}
    whole = language.client.chat.completions.create(**asked)
    chunks = list(language.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert chunks[-1].usage == whole.usage
    tokenizer = load_tokenizer(directories.language_model())
    assert whole.usage.prompt_tokens == len(tokenizer.apply_chat(MESSAGES, add_generation_prompt=True)[0])
    assert whole.usage.completion_tokens <= 24
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    assert (whole.object, chunks[0].object, whole.model) == ("chat.completion", "chat.completion.chunk", "tiny")
    parts = [{"role": "user", "content": [{"type": "text", "text": "what is 2"}, {"type": "text", "text": " + 3 ?"}]}]
    again = language.client.chat.completions.create(**asked | {"messages": parts, "max_completion_tokens": 12, "user": "me"})
    assert [choice.message for choice in again.choices] == [choice.message for choice in whole.choices]


def test_completions_of_several_prompts(language):
    asked = {"model": "tiny", "max_tokens": 8, "seed": 1, "n": 2}
    whole = language.client.completions.create(prompt=["what is", "it is 5"], **asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    tokenizer = load_tokenizer(directories.language_model())
    ids = [tokenizer.encode(text, start=True) for text in ("what is", "it is 5")]
    assert whole.usage.prompt_tokens == sum(map(len, ids))
    by_ids = language.client.completions.create(prompt=ids, **asked)
    chunks = list(language.client.completions.create(prompt=ids, **asked, stream=True))
    for choice, same in zip(whole.choices, by_ids.choices, strict=True):
        assert choice.text == same.text
        assert choice.text == "".join(c.text for chunk in chunks for c in chunk.choices if c.index == choice.index)
    alone = language.client.completions.create(prompt=ids[0], **asked)
    assert [choice.text for choice in alone.choices] == [choice.text for choice in whole.choices[:2]]


def test_a_stop_string_and_greedy(language):
    asked = {"model": "tiny", "prompt": "what is", "max_tokens": 16, "temperature": 0}
    text = language.client.completions.create(**asked).choices[0].text
    stop = text[4:6]
    cut = language.client.completions.create(**asked, stop=[stop, "never there"]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")
    length = language.client.completions.create(**asked | {"max_tokens": 2}).choices[0]
    assert length.finish_reason == "length"


def test_logprobs(language):
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "seed": 0}
    chosen = language.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    rows = chosen.logprobs.content
    assert 1 <= len(rows) <= 5
    for row in rows:
        assert len(row.top_logprobs) == 3
        assert row.logprob <= row.top_logprobs[0].logprob < 0
        assert row.token.startswith("bytes:") or bytes(row.bytes).decode() == row.token
    assert language.client.chat.completions.create(**asked).choices[0].logprobs is None
    chunks = language.client.chat.completions.create(**asked, logprobs=True, stream=True)
    streamed = [r for chunk in chunks for c in chunk.choices if c.logprobs for r in c.logprobs.content]
    assert [(r.token, r.top_logprobs) for r in streamed] == [(r.token, []) for r in rows]
    plain = language.client.completions.create(model="tiny", prompt="what", max_tokens=5, seed=0, logprobs=2).choices[0].logprobs
    assert len(plain.tokens) == len(plain.token_logprobs) == len(plain.text_offset)
    assert {len(row) for row in plain.top_logprobs} == {2}
    assert plain.text_offset[0] == 0


def sentencepiece():
    """A tokenizer of Llama 2's kind, whose text has lost the space before its first word."""
    vocabulary = ["<unk>", "<s>", "</s>", "<0xE6>", "<0x97>", "<0xA5>", "▁the", "the", "▁w", "x"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: n for n, token in enumerate(vocabulary)}, [], byte_fallback=True)
    )
    backend.add_special_tokens(vocabulary[:3])
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    backend.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Strip(" ", 1, 0)])
    return make_tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}), [6, 8, 2, 3, 4, 5, 9, 7, 6]


def words():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "the": 1, "pool": 2, ".": 3}, unk_token="."))
    backend.add_special_tokens(["<eos>"])
    return make_tokenizer(backend, {"eos_token": "<eos>"}), [1, 2, 0, 3, 1]


def bytelevel():
    tokenizer = load_tokenizer(directories.language_model())
    return tokenizer, [*tokenizer.encode("what is 2 日é"), tokenizer.eos_id, *tokenizer.encode(" it")]


@pytest.mark.parametrize("made", [sentencepiece, words, bytelevel])
def test_tokens_have_their_own_names_and_stand_where_the_text_has_them(made):
    tokenizer, ids = made()
    text = tokenizer.decode(ids)
    everything = tuple((number, -float(number)) for number in range(tokenizer.vocab_size))
    tokens = [Token(number, -1.0, everything) for number in ids]
    reply = Reply("m", tokenizer, chat=False, top=tokenizer.vocab_size)
    whole = reply.logprobs(tuple(tokens), 0)
    streamed = [reply.chunk(Piece(1, "", (token,)))["choices"][0]["logprobs"] for token in tokens]
    assert [row["text_offset"][0] for row in streamed] == whole["text_offset"]
    assert {len(row) for row in whole["top_logprobs"]} == {tokenizer.vocab_size}, "no two tokens share a name"
    shown = ""
    for name, at, number in zip(whole["tokens"], whole["text_offset"], ids, strict=True):
        assert at == len(shown), name
        if number == tokenizer.eos_id:
            assert name.strip() == tokenizer.names["eos_token"]
        elif not name.startswith("bytes:"):
            part = name if text.startswith(name, at) else name.removeprefix(" ")
            assert text.startswith(part, at)
            assert part == name or at == 0
            shown += part
        elif tokenizer.decode(ids[: ids.index(number) + 1])[-1:] in ("日", "é"):
            shown += text[at]
    assert shown == text
    chat = Reply("m", tokenizer, chat=True, top=0).logprobs(tuple(tokens), 0)["content"]
    kept = b"".join(bytes(row["bytes"]) for row, number in zip(chat, ids, strict=True) if number != tokenizer.eos_id)
    assert kept.removeprefix(b" ").decode() == text.removeprefix(" ")


def test_an_answer_can_be_sent_back(language):
    messages = [*MESSAGES]
    answer = language.client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, seed=1).choices[0].message
    messages += [answer, *MESSAGES]
    assert language.client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).choices


def test_models_and_health(language, rewarding):
    (entry,) = language.client.models.list().data
    assert (entry.id, entry.owned_by) == ("tiny", "rlhf-jax")
    assert language.client.models.retrieve("tiny") == entry
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' is not here; this is 'tiny'"):
        language.client.models.retrieve("gpt")
    assert language.http("GET", "/v1/models")[1]["data"][0]["max_model_len"] == directories.LENGTH
    assert rewarding.http("GET", "/v1/models")[1]["data"][0]["kind"] == "score"
    assert language.http("GET", "/health") == (200, {"status": "ok", "requests": 0})


# Scores.


def test_scores_are_those_of_the_reward_model(rewarding):
    model = scorer.open_scorer(directories.reward_model(), mesh=config.Mesh(data=1, fsdp=1), devices=jax.devices()[:1])
    rows = [("what is 2 + 3 ?", " 5", True), ("what is 2 + 3 ?", " 5", False), ("it is", "", True)]
    wanted = model.score([model.encode(*row) for row in rows]).tolist()
    assert len(set(wanted)) == 3, "end-of-sequence counts"
    for (prompt, response, finished), value in zip(rows, wanted, strict=True):
        status, found = rewarding.http("POST", "/v1/score", {"prompt": prompt, "response": response, "finished": finished})
        assert status == 200
        assert found["scores"] == [pytest.approx(value, abs=1e-6)]
        assert found["data"] == [{"object": "score", "index": 0, "score": found["scores"][0]}]
    conversation = [*MESSAGES, {"role": "assistant", "content": "5"}]
    (said,) = rewarding.http("POST", "/v1/score", {"model": "tiny-reward", "messages": conversation})[1]["scores"]
    assert said == pytest.approx(model.score([model.encode(MESSAGES, "5")])[0], abs=1e-6)
    halves = {"prompt": MESSAGES, "response": "5"}
    assert rewarding.http("POST", "/v1/score", halves)[1]["scores"] == [said]


def test_a_score_is_the_head_at_the_last_token(tmp_path):
    """Of rows of any length, also those that padding follows: beside the model itself without padding.

    As in transformers, tokens like config.json's `pad_token_id` at the end are passed over.
    """
    directory, pad_id = shutil.copytree(directories.reward_model(), tmp_path / "rm"), 40
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"pad_token_id": pad_id}))
    model = scorer.open_scorer(directory, mesh=config.Mesh(data=1, fsdp=1), devices=jax.devices()[:1])
    found = models.load_checkpoint(directory, head="score")
    plain = models.make_model(found.spec)
    whole = jax.jit(lambda params, tokens: plain.score(params, plain.hidden(params, tokens, jnp.ones_like(tokens, bool))))
    rows = [*(list(range(10, 10 + length)) for length in (1, 7, 31, 32, 33)), [pad_id]]
    assert [row[-1] == pad_id for row in rows] == [False, False, True, False, False, True]
    for row, score, place in zip(rows, model.score(rows), (-1, -1, -2, -1, -1, 0), strict=True):
        raw = whole(found.params, jnp.asarray([row]))[0, place]
        assert score == pytest.approx((float(raw) - found.calibration.mean) / found.calibration.std, abs=1e-5)


def test_a_score_depends_on_its_own_row_alone():
    model = scorer.open_scorer(directories.reward_model(), mesh=config.Mesh(data=1, fsdp=1), devices=jax.devices()[:1])
    rows = [model.encode("what is 2 + 3 ?", " 5" * n) for n in range(20)]
    together = model.score(rows)
    alone = [model.score([row])[0] for row in rows[::7]]
    np.testing.assert_allclose(together[::7], alone, atol=1e-6)
    assert model.score([]).shape == (0,)


def test_another_run_can_use_it_as_its_reward_server(rewarding):
    url = f"http://127.0.0.1:{rewarding.port}/v1/score"
    batch = RewardInput(["what is", "it is"], [" 5", ""], np.asarray([True, False]), {"answer": [5, None]})
    values = http_reward(url, timeout_s=60)(batch)
    one = rewarding.http("POST", "/v1/score", {"prompt": "it is", "response": "", "finished": False})[1]["scores"]
    assert values.tolist() == [pytest.approx(values[0]), pytest.approx(one[0], abs=1e-6)]


# Refusals.


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, {}, 400, "messages: field required"),
        (CHAT, {"messages": []}, 400, "messages: list should have at least 1 item"),
        (CHAT, {"messages": [{"role": "wizard", "content": ""}]}, 400, "messages.0.role: input should be 'system'"),
        (CHAT, ASKED | {"tools": [{"type": "function"}]}, 400, "tools is not supported; supported"),
        (CHAT, ASKED | {"temperature": "hot"}, 400, 'temperature: input should be a valid number, found "hot"'),
        (CHAT, ASKED | {"temperature": -1}, 400, "temperature: input should be greater than or equal"),
        (CHAT, ASKED | {"n": 99}, 400, "n: input should be less than or equal to 16"),
        (CHAT, ASKED | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
        (CHAT, ASKED | {"stop": [""]}, 400, "stop is ('',)"),
        (CHAT, ASKED | {"stop": ["a"] * 17}, 400, "stop: list should have at most 16 items"),
        (CHAT, {"messages": [{"role": "tool", "content": "", "tool_call_id": "1"}]}, 400, "messages.0.role: input should be"),
        (
            CHAT,
            {"messages": [MESSAGES[0] | {"name": "me"}]},
            400,
            "messages.0.name is not supported; supported are: role, content",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content.0.type: input should",
        ),
        (CHAT, {"messages": [{"role": "assistant", "content": None}]}, 400, "messages.0.content: field required"),
        (CHAT, ASKED | {"model": "gpt"}, 404, "the model 'gpt' is not here; this is 'tiny'"),
        (CHAT, ASKED | {"frequency_penalty": 0.5}, 400, "frequency_penalty is not supported"),
        ("completions", {"prompt": "a", "echo": True}, 400, "echo is not supported"),
        ("completions", {"prompt": "a", "max_tokens": 128}, 400, "max_tokens is 128; it must be between 1 and 126"),
        ("completions", {"prompt": [5] * 128}, 400, "the prompt has 128 tokens and the model takes 128"),
        ("completions", {"prompt": []}, 400, "prompt: an empty one leaves nothing to go on from"),
        ("completions", {"prompt": [[5], []]}, 400, "prompt: an empty one"),
        ("completions", {"prompt": [300]}, 400, "a token id of the prompt is [300]; it must be between 0 and"),
        ("completions", {"prompt": ["a"] * 65}, 400, "65 prompts in one request"),
        ("completions", {"prompt": {"a": 1}}, 400, "prompt"),
        ("completions", {"prompt": "a", "\ud83d": 1}, 400, "a key: input should be a valid string"),
        ("score", {"prompt": "a", "response": "b"}, 400, "tiny is a language model, which cannot do this"),
        ("score", {"prompt": "a"}, 400, "tiny is a language model"),
        ("embeddings", {"input": "a"}, 404, "POST /v1/embeddings: Not Found"),
    ],
)
def test_wrong_requests_get_one_message(language, path, body, status, message):
    found, answer = language.http("POST", f"/v1/{path}", body)
    assert found == status
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give prompt and response, or messages"),
        ({"prompt": "a"}, "prompt needs a response"),
        ({"messages": MESSAGES}, "messages must end with the assistant's answer"),
        ({"prompts": ["a"], "responses": []}, "1 prompts and 0 responses"),
        ({"prompts": ["a"], "responses": ["b"], "finished": [True, True]}, "finished has 2 values for 1 rows"),
        ({"prompt": "a" * 200, "response": "b"}, "tokens and the reward model takes 1 to 128"),
        ({"messages": MESSAGES, "prompt": "a"}, "exactly one of the three"),
    ],
)
def test_wrong_score_requests(rewarding, body, message):
    status, answer = rewarding.http("POST", "/v1/score", body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_the_client_sees_its_own_exceptions(language, rewarding):
    with pytest.raises(openai.NotFoundError, match="is not here"):
        language.client.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="shorten the prompt") as found:
        language.client.completions.create(model="tiny", prompt=[5] * 200)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tiny-reward is a reward model, which cannot do this"):
        rewarding.client.chat.completions.create(model="tiny-reward", messages=MESSAGES, stream=True)


def test_bodies_hosts_and_methods(language, monkeypatch):
    path = "/v1/completions"
    assert language.http("GET", path)[0] == 405
    assert language.http("POST", path, b"{")[1]["error"]["message"].startswith("the body is not JSON")
    assert language.http("POST", path, b"[" * 100_000)[0] == 400
    assert language.http("POST", path, b"[]")[1]["error"]["message"] == "the body must be a JSON object, is list"
    assert language.http("POST", path, {"prompt": "a"}, **{"Content-Type": "text/plain"})[0] == 415
    assert language.http("POST", path, {"prompt": "a"}, Host="evil.example")[0] == 403
    monkeypatch.setattr(app, "BODY_LIMIT", 1000)
    status, answer = language.http("POST", path, {"prompt": "a" * 1000})
    assert (status, answer["error"]["message"]) == (413, "the body has more than 1000 bytes; send less at one time")
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", language.port), timeout=20) as slow:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n"
        slow.sendall(head.encode())
        assert b" 408 " in slow.recv(100)


def test_neutral_values_are_taken():
    body = {"messages": MESSAGES, "frequency_penalty": 0.0, "tools": [], "seed": None, "response_format": {"type": "text"}}
    assert schema.parse(schema.ChatRequest, json.dumps(body).encode()).seed is None
    with pytest.raises(schema.Refusal, match="store is not supported"):
        schema.parse(schema.ChatRequest, json.dumps(body | {"store": True}).encode())


def test_a_fault_of_the_server_is_an_error_object(language, monkeypatch):
    def fail(self, ask):
        raise ZeroDivisionError

    monkeypatch.setattr(type(language.service.model), "check", fail)
    status, answer = language.http("POST", "/v1/completions", {"prompt": "a"})
    assert (status, answer["error"]["type"]) == (500, "server_error")


# Several at one time.


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_its_answer(language, monkeypatch, stream):
    """An answer without an end ends when nobody listens any more, streamed or not."""
    closed = threading.Event()

    def endless(self, ask):
        try:
            while True:
                time.sleep(0.001)
                yield Piece(0, "more ", ())
        finally:
            closed.set()

    monkeypatch.setattr(Streamer, "stream", endless)
    connection = http.client.HTTPConnection("127.0.0.1", language.port, timeout=60)
    body = json.dumps({"prompt": "what", "max_tokens": 100, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    if stream:
        assert b"more" in connection.getresponse().fp.read(300)
    wait_until(lambda: language.service.requests == 1)
    assert not closed.is_set()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert closed.wait(60)
    wait_until(lambda: language.service.requests == 0)


def test_too_many_are_refused(language, monkeypatch):
    monkeypatch.setattr(service, "WAITING", 0)
    with pytest.raises(openai.RateLimitError, match="ask again later"):
        language.client.completions.create(model="tiny", prompt="what", max_tokens=1)


def test_chunks_of_several_answers_alternate():
    """Eight at one time; the ninth begins when one of them has ended."""
    order = []

    class Scripted:
        def stream(self, ask):
            for number in range(5):
                order.append((ask.seed, number))
                yield Piece(0, "", (), "stop" if number == 4 else None)

    async def one(made, seed):
        return [piece async for piece in service.pieces(made, [Ask([], 1, seed=seed)])]

    async def all_of_them():
        made = service.Service("m", Scripted(), 1, ())
        return await asyncio.gather(*(one(made, seed) for seed in range(9)))

    assert [len(found) for found in asyncio.run(all_of_them())] == [5] * 9
    assert [seed for seed, _ in order[:8]] == list(range(8))
    assert order.index((7, 1)) < order.index((0, 4)), "nobody is answered to the end before the others have had a turn"
    assert order.index((8, 0)) > order.index((0, 4))


def test_a_turn_is_given_back():
    async def hold():
        made = service.Service("m", None, 1, ())
        with contextlib.suppress(ZeroDivisionError):
            async with made.turn():
                assert made.requests == 1
                raise ZeroDivisionError
        return made.requests

    assert asyncio.run(hold()) == 0


# The command.


def test_what_keeps_it_from_starting(monkeypatch, capsys):
    def start(directory, *options):
        monkeypatch.setattr(sys, "argv", ["rlhf-jax", "serve", str(directory), *options])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert exit_info.value.code == 2
        return capsys.readouterr().err

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        message = start("nowhere", "--port", str(taken.getsockname()[1]))
        assert re.fullmatch(r"rlhf-jax: cannot listen on 127.0.0.1:\d+: Address already in use; another --port .*\n", message)
    assert "nowhere: no such directory" in start("nowhere", "--port", "0")
    assert "cannot listen on 203.0.113.1:0: " in start("nowhere", "--host", "203.0.113.1", "--port", "0")
    assert "--tensor 64: this machine has" in start(directories.language_model(), "--port", "0", "--tensor", "64")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert start("nowhere") == "rlhf-jax: rlhf-jax serve needs the package uvicorn: pip install 'rlhf-jax[serve]'\n"


def test_other_machines_must_be_asked_for_and_are_warned_of(capsys):
    made = service.Service("m", object.__new__(app.Streamer), 1, ())
    made.model.generator = type("G", (), {"tokenizer": load_tokenizer(directories.language_model(chat=False))})
    app.announce(made, "0.0.0.0", 80)  # noqa: S104
    text = capsys.readouterr().err
    assert "WARNING: other machines can reach 0.0.0.0" in text
    assert "no chat template" in text
    assert "m is at http://0.0.0.0:80/v1 (/v1/chat/completions, /v1/completions)" in text
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        app.announce(made, host, 80)
        assert "WARNING" not in capsys.readouterr().err
    app.announce(made, "my.machine", 80)
    assert "WARNING" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot listen on ::1:"), app.listening("::1", 1), app.listening("::1", 1):
        pass


def test_a_process_of_its_own_serves_and_leaves_when_told():
    directory = directories.language_model()
    command = [sys.executable, "-m", "rlhf_jax", "serve", str(directory), "--port", "0", "--name", "mine"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = None
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"mine is at (http://127\.0\.0\.1:\d+/v1)", line):
                    url = found[1]
                    break
            assert url is not None
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
                answer = client.chat.completions.create(model="mine", messages=MESSAGES, max_tokens=4)
            assert answer.usage.completion_tokens >= 1
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
