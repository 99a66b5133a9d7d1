"""HTTP around `service.py`: bounded bodies, server-sent events, OpenAI's error objects, a socket on loopback."""

import asyncio
import contextlib
import ipaddress
import json
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import config, models
from rlhf_jax.errors import UserError
from rlhf_jax.generate import PLAIN_CHAT, open_model
from rlhf_jax.scorer import Scorer, open_scorer
from rlhf_jax.serving.schema import Refusal
from rlhf_jax.serving.service import ROUTES, Service, tokenizer_of
from rlhf_jax.streaming import Streamer, context_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names under which a server on loopback is spoken to
BODY_LIMIT = 4 << 20  # bytes
BODY_SECONDS = 30.0  # a body that is not there by then never comes
HTTP: dict[str, Any] = {"loop": "asyncio", "http": "h11", "ws": "none", "lifespan": "off"}  # the same whatever is installed
HUNG_UP = 499  # status that nobody reads: the client has gone


async def body_of(request: Any) -> bytes:
    """The body of a request, bounded in size and time. Errors: `Refusal`."""
    if request.method == "GET":
        return b""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be JSON: send Content-Type: application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > BODY_LIMIT:
                    raise Refusal(413, f"the body has more than {BODY_LIMIT} bytes; send less at one time")
                parts.append(part)
    except TimeoutError:
        raise Refusal(408, f"the body was not there after {BODY_SECONDS:g} s") from None
    return b"".join(parts)


def make_app(service: Service) -> Any:
    """The ASGI application. Errors are OpenAI's objects; a request to another host name is refused (DNS rebinding)."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, StreamingResponse
    from starlette.routing import Route

    def endpoint(handler: Callable[..., Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def run(request: Any) -> Any:
            if service.hosts and request.url.hostname not in service.hosts:
                raise Refusal(403, f"this server is {service.hosts[0]}, not {request.url.hostname}")
            found = await handler(service, await body_of(request), **request.path_params)
            if isinstance(found, dict):
                return JSONResponse(found)
            if hasattr(found, "__aiter__"):
                return StreamingResponse(events(found), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            return JSONResponse(await until_hung_up(request, found))

        return run

    async def refused(request: Any, error: Any) -> Any:
        if isinstance(error, UserError):
            too_long = "context_length_exceeded" if "shorten" in str(error) or "max_tokens" in str(error) else None
            error = Refusal(400, str(error), code=too_long)
        elif isinstance(error, HTTPException):
            error = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        elif not isinstance(error, Refusal):
            error = Refusal(500, f"a fault of the server: {type(error).__name__}; its terminal says more")
        return JSONResponse(error.body(), status_code=error.status)

    routes = [Route(path, endpoint(handler), methods=[method]) for method, path, handler in ROUTES]
    handlers = dict.fromkeys((Refusal, UserError, HTTPException, Exception), refused)
    return Starlette(routes=routes, exception_handlers=handlers)


async def events(found: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[str]:
    """Server-sent events, one an object."""
    async with contextlib.aclosing(found) as objects:
        async for entry in objects:
            yield f"data: {json.dumps(entry, ensure_ascii=False)}\n\n"
    yield "data: [DONE]\n\n"


async def until_hung_up(request: Any, answer: Awaitable[Any]) -> Any:
    """The answer; computing it is given up when the client has gone."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(request.receive())  # after the body: only the client's leave is still to come
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(HUNG_UP, "the client has gone")
        return await task
    finally:
        task.cancel()
        gone.cancel()


def serve(
    model_dir: Path,
    *,
    host: str,
    port: int,
    name: str | None = None,
    max_new_tokens: int = 512,
    max_length: int | None = None,
    dtype: Any = "float32",
    tensor: int = 1,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM. Raises `UserError` where the directory, the address or a package is missing."""
    try:
        import uvicorn
    except ImportError as error:
        raise UserError(f"rlhf-jax serve needs the package {error.name}: pip install 'rlhf-jax[serve]'") from None
    with listening(host, port) as listener:
        service = open_service(model_dir, name or str(model_dir), host, max_new_tokens, max_length, dtype, tensor)
        settings = uvicorn.Config(make_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=5, **HTTP)
        announce(service, host, listener.getsockname()[1])
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])


def open_service(
    model_dir: Path, name: str, host: str, max_new_tokens: int, max_length: int | None, dtype: Any, tensor: int
) -> Service:
    """Load the model, whichever kind it is."""
    devices = jax.devices()[:tensor]
    if len(devices) < tensor:
        raise UserError(f"--tensor {tensor}: this machine has {len(devices)} devices")
    mesh = config.Mesh(data=1, fsdp=1, tensor=tensor)
    model: Streamer | Scorer
    if models.has_scalar_head(model_dir):
        model = open_scorer(model_dir, mesh=mesh, devices=devices, dtype=dtype)
    else:
        generator = open_model(model_dir, config.Model(path=str(model_dir), compute_dtype=dtype), mesh=mesh, devices=devices)
        model = Streamer(generator, context_of(generator, max_length))
    return Service(name, model, max_new_tokens, (*LOOPBACK, host) if is_loopback(host) else ())


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def listening(host: str, port: int) -> Any:
    """A listening socket. Raises `UserError` where the address is taken or is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; another --port (0: any free one) or --host would do"
            ) from None
        yield listener


def announce(service: Service, host: str, port: int) -> None:
    """Say on standard error where the server is, and what a user should know."""
    lines = []
    if isinstance(service.model, Streamer) and tokenizer_of(service).chat_template is None:
        lines.append(PLAIN_CHAT)
    if not is_loopback(host):
        lines.append(f"WARNING: other machines can reach {host}, and whoever reaches it can use it; there is no password")
    what = "/v1/score" if isinstance(service.model, Scorer) else "/v1/chat/completions, /v1/completions"
    shown = f"[{host}]" if ":" in host else host
    lines.append(f"{service.name} is at http://{shown}:{port}/v1 ({what}); Ctrl-C stops")
    sys.stderr.write("".join(f"rlhf-jax: {line}\n" for line in lines))
    sys.stderr.flush()
