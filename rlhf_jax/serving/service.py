"""What `rlhf-jax serve` answers on each route. One thread computes, a chunk of every answer in turn."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.generate import encode_conversation
from rlhf_jax.scorer import Scorer
from rlhf_jax.serving.answers import Reply, usage
from rlhf_jax.serving.schema import MOST_PROMPTS, ChatRequest, CompletionRequest, Refusal, ScoreRequest, parse
from rlhf_jax.streaming import Ask, Piece, Streamer

AT_ONCE = 8  # requests that are answered in turns; each holds a cache
WAITING = 64  # requests beyond these are refused with status 429


@dataclass
class Service:
    """A model, its name, and the one thread that runs it."""

    name: str
    model: Streamer | Scorer
    max_new_tokens: int  # of an answer for which the request says nothing
    hosts: tuple[str, ...]  # names under which it is spoken to; (): any
    created: int = field(default_factory=lambda: int(time.time()))
    requests: int = 0  # that are answered or wait
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "model"))
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until few enough requests are answered."""
        self.requests += 1
        try:
            async with self.turns:
                yield
        finally:
            self.requests -= 1

    def named(self, name: str | None) -> None:
        """Raise `Refusal` where the name is another model's."""
        if name not in (None, self.name):
            raise Refusal(404, f"the model {name!r} is not here; this is {self.name!r}", param="model", code="model_not_found")

    def check(self, request: Any, wanted: type) -> None:
        """Raise `Refusal` where the name is another model's, the model is of another kind, or too many wait."""
        self.named(request.model)
        if not isinstance(self.model, wanted):
            kind, can = ("reward model", "score") if isinstance(self.model, Scorer) else ("language model", "completions")
            raise Refusal(400, f"{self.name} is a {kind}, which cannot do this; it answers /v1/{can}", code="wrong_model_kind")
        if self.requests >= WAITING:
            raise Refusal(429, f"{self.requests} requests are waiting already; ask again later", code="rate_limit_exceeded")


async def chat_completions(service: Service, raw: bytes) -> Any:
    """POST /v1/chat/completions."""
    request = parse(ChatRequest, raw)
    service.check(request, Streamer)
    ids, stops = encode_conversation(tokenizer_of(service), [message.plain() for message in request.messages])
    top = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs is not None and not request.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    limit = request.max_completion_tokens or request.max_tokens
    asks = [make_ask(service, request, ids, limit, request.stops + stops, top)]
    return reply(service, request, asks, Reply(service.name, tokenizer_of(service), chat=True, top=top))


async def completions(service: Service, raw: bytes) -> Any:
    """POST /v1/completions."""
    request = parse(CompletionRequest, raw)
    service.check(request, Streamer)
    tokenizer = tokenizer_of(service)
    if len(request.prompts) > MOST_PROMPTS:
        raise Refusal(400, f"{len(request.prompts)} prompts in one request; at most {MOST_PROMPTS}", param="prompt")
    rows = [tokenizer.encode(prompt, start=True) if isinstance(prompt, str) else prompt for prompt in request.prompts]
    if not all(map(len, rows)):
        raise Refusal(400, "prompt: an empty one leaves nothing to go on from; give text or token ids", param="prompt")
    seeds = make_ask(service, request, [], None, (), None).seed
    asks = [
        make_ask(service, request, ids, request.max_tokens, request.stops, request.logprobs)._replace(seed=(seeds + row) % 2**63)
        for row, ids in enumerate(rows)
    ]
    return reply(service, request, asks, Reply(service.name, tokenizer, chat=False, top=request.logprobs))


async def score(service: Service, raw: bytes) -> Any:
    """POST /v1/score."""
    request = parse(ScoreRequest, raw)
    service.check(request, Scorer)
    scorer: Any = service.model
    rows = [scorer.encode(*row) for row in request.rows()]
    async with service.turn():
        scores = (await asyncio.get_running_loop().run_in_executor(service.worker, scorer.score, rows)).tolist()
    data = [{"object": "score", "index": row, "score": value} for row, value in enumerate(scores)]
    found = {"object": "list", "model": service.name, "data": data, "scores": scores}
    return found | {"usage": usage(sum(map(len, rows)), 0)}


async def list_models(service: Service, raw: bytes) -> Any:
    """GET /v1/models."""
    del raw
    kind = "score" if isinstance(service.model, Scorer) else "generate"
    entry = {"id": service.name, "object": "model", "created": service.created, "owned_by": "rlhf-jax"}
    return {"object": "list", "data": [entry | {"kind": kind, "max_model_len": service.model.max_length}]}


async def one_model(service: Service, raw: bytes, name: str) -> Any:
    """GET /v1/models/NAME."""
    service.named(name)
    return (await list_models(service, raw))["data"][0]


async def health(service: Service, raw: bytes) -> Any:
    """GET /health."""
    del raw
    return {"status": "ok", "requests": service.requests}


ROUTES: tuple[tuple[str, str, Callable[..., Awaitable[Any]]], ...] = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/score", score),
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{name:path}", one_model),  # a directory's name has slashes
    ("GET", "/health", health),
)


def tokenizer_of(service: Service) -> Any:
    model = service.model
    return model.tokenizer if isinstance(model, Scorer) else model.generator.tokenizer


def make_ask(
    service: Service, request: Any, ids: Sequence[int], limit: int | None, stops: tuple[str, ...], top: int | None
) -> Ask:
    """What the model is asked. Errors: `UserError` where the prompt leaves no room."""
    streamer: Any = service.model
    return Ask(
        ids=ids,
        max_tokens=limit or min(service.max_new_tokens, streamer.room(ids)),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=secrets.randbits(31) if request.seed is None else request.seed,
        samples=request.n,
        stop=stops,
        top=bool(top),
    )


def reply(service: Service, request: Any, asks: list[Ask], made: Reply) -> Any:
    """The answer whole (an awaitable) or as a stream of objects; mistakes are refused before either begins."""
    streamer: Any = service.model
    for ask in asks:
        streamer.check(ask)
    prompt_tokens, count = sum(len(ask.ids) for ask in asks), len(asks) * request.n
    if request.stream:
        usage_too = request.stream_options is not None and request.stream_options.include_usage
        return chunks(service, asks, made, count, prompt_tokens if usage_too else None)

    async def whole() -> dict[str, Any]:
        return made.whole([piece async for piece in pieces(service, asks)], prompt_tokens, count)

    return whole()


async def pieces(service: Service, asks: list[Ask]) -> AsyncGenerator[Piece, None]:
    """Pieces of all answers, choices numbered through. Leaving it early, as a client that hangs up makes us, stops the model."""
    streamer: Any = service.model
    loop = asyncio.get_running_loop()
    async with service.turn():
        for place, ask in enumerate(asks):
            stream = streamer.stream(ask)
            try:
                while (piece := await loop.run_in_executor(service.worker, next, stream, None)) is not None:
                    yield piece._replace(sample=place * ask.samples + piece.sample)
            finally:
                service.worker.submit(stream.close)


async def chunks(
    service: Service, asks: list[Ask], made: Reply, count: int, prompt_tokens: int | None
) -> AsyncGenerator[dict[str, Any], None]:
    """The objects of a stream; the last holds the usage where `prompt_tokens` is given."""
    if made.chat:
        for index in range(count):
            yield made.opening(index)
    total = 0
    async with contextlib.aclosing(pieces(service, asks)) as found:
        async for piece in found:
            yield made.chunk(piece)
            total += len(piece.tokens)
    if prompt_tokens is not None:
        yield made.closing(prompt_tokens, total)
