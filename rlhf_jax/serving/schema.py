"""What a request may hold, checked before anything runs. A key that would be ignored is refused instead."""

import json
import re
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from rlhf_jax.data.formats import Message, Text
from rlhf_jax.streaming import SAMPLES, TOP

MOST_PROMPTS = 64
MOST_STOPS = 16

# Values that change nothing, which clients send unasked; any other value of these keys is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tools": ([],),
}


class Refusal(Exception):
    """A request that is answered with an error object: {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Checked(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """A null is a key left out: clients send the answers back that they were given, with all their fields."""
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class TextPart(_Checked):
    type: Literal["text"]
    text: str


class ChatMessage(_Checked):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class StreamOptions(_Checked):
    include_usage: bool = False


class _Answering(_Checked):
    model: str | None = None
    max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] | None = None
    n: Annotated[int, pydantic.Field(ge=1, le=SAMPLES)] = 1
    stop: str | Annotated[list[str], pydantic.Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # taken and not used: it names the caller's customer
    metadata: dict[str, str] | None = None  # the same

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Answering):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], pydantic.Field(min_length=1)]
    max_completion_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=TOP)] | None = None


class CompletionRequest(_Answering):
    """Body of /v1/completions; a prompt is text or token ids, or there is a list of either."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, pydantic.Field(ge=0, le=TOP)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        return given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]


class ScoreRequest(_Checked):
    """Body of /v1/score: prompt and response, a list of both (what `reward.url` sends), or messages that end with an answer."""

    model: str | None = None
    prompt: str | list[ChatMessage] | None = None
    response: str | None = None
    messages: list[ChatMessage] | None = None
    finished: bool | list[bool] = True
    prompts: list[str] | None = None
    responses: list[str] | None = None
    columns: dict[str, Any] | None = None  # sent by `reward.url`; a reward model reads texts only

    def rows(self) -> list[tuple[Text, str, bool]]:
        """(prompt, response, finished) of every row. Errors: `Refusal`."""
        forms = [self.prompt is not None, self.messages is not None, self.prompts is not None]
        if sum(forms) != 1:
            raise Refusal(400, "give prompt and response, or messages, or prompts and responses; exactly one of the three")
        if self.messages is not None:
            messages = [message.plain() for message in self.messages]
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise Refusal(400, "messages must end with the assistant's answer to score", param="messages")
            return [(messages[:-1], messages[-1]["content"], self._flags(1)[0])]
        if self.prompt is not None:
            if self.response is None:
                raise Refusal(400, "prompt needs a response to score", param="response")
            prompt = self.prompt if isinstance(self.prompt, str) else [message.plain() for message in self.prompt]
            return [(prompt, self.response, self._flags(1)[0])]
        prompts, responses = self.prompts or [], self.responses or []
        if len(prompts) != len(responses):
            raise Refusal(400, f"{len(prompts)} prompts and {len(responses)} responses; one of each a row", param="responses")
        return list(zip(prompts, responses, self._flags(len(prompts)), strict=True))

    def _flags(self, count: int) -> list[bool]:
        flags = self.finished if isinstance(self.finished, list) else [self.finished] * count
        if len(flags) != count:
            raise Refusal(400, f"finished has {len(flags)} values for {count} rows", param="finished")
        return flags


Request = TypeVar("Request", bound=_Checked)


def parse(cls: type[Request], raw: bytes) -> Request:
    """A body as a request. Errors: `Refusal` naming the first key that is wrong, its rule and its value."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object, is {type(body).__name__}")
    body = {key: value for key, value in body.items() if not _is_neutral(key, value)}
    try:
        return cls.model_validate(body)
    except pydantic.ValidationError as error:
        raise _refusal(cls, error) from None


def _is_neutral(key: str, value: Any) -> bool:
    return any(type(value) in (type(other), float) and value == other for other in NEUTRAL.get(key, ()))


# Objects within a body, by the key that holds them.
_PARTS: dict[Any, type[_Checked]] = {
    "messages": ChatMessage,
    "prompt": ChatMessage,
    "content": TextPart,
    "stream_options": StreamOptions,
}


def _refusal(cls: type[_Checked], error: pydantic.ValidationError) -> Refusal:
    """The mistake that says most: of a union the forms that were not meant complain of the type."""

    def rank(entry: Any) -> int:
        kinds = ("literal_error", "extra_forbidden")
        return kinds.index(entry["type"]) if entry["type"] in kinds else 2 + entry["type"].endswith("_type")

    first = min(error.errors(include_url=False), key=rank)
    loc = [part for part in first["loc"] if not re.fullmatch(r"str|list\[.*\]|constrained-.*", str(part))] or first["loc"]
    param = ".".join(map(str, loc)) or "a key"  # half a surrogate pair, which is in no place
    if first["type"] == "extra_forbidden":
        of = next((_PARTS[part] for part in reversed(loc[:-1]) if part in _PARTS), cls)
        return Refusal(400, f"{param} is not supported; supported are: {', '.join(of.model_fields)}", param=param)
    value = "" if first["type"] == "missing" else f", found {json.dumps(first['input'], default=str)[:80]}"
    where = str(first["loc"][0]) if loc else None
    return Refusal(400, f"{param}: {first['msg'][0].lower()}{first['msg'][1:]}{value}", param=where)
