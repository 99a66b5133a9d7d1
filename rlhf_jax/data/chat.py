"""Chat templates: messages to text, and which of its characters the assistant wrote.

The environment is the one that templates on the hub are written for (sandboxed jinja2, trimmed blocks, `raise_exception`,
`strftime_now`, `{% generation %}`), so a template renders here as in transformers.
"""

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any

from rlhf_jax.data.formats import Message
from rlhf_jax.data.sources import BadRow
from rlhf_jax.errors import UserError

Spans = list[tuple[int, int]]

# Private-use characters around what `{% generation %}` encloses; taken out of the text again before anyone sees it.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 reads a plain class attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller: Callable[[], str]) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"chat template: line {getattr(error, 'lineno', '?')}: {error}; mend model.chat_template") from None


def _rendered(template: str, messages: list[Message], add_generation_prompt: bool, names: dict[str, str | None]) -> str:
    import jinja2

    tokens = {key: value for key, value in names.items() if value is not None}
    clean = [{**message, "content": message["content"].replace(_OPEN, "").replace(_CLOSE, "")} for message in messages]
    try:
        given = {"messages": clean, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return _compiled(template).render(**given, **tokens)  # all that transformers gives: templates ask for None
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        roles = [message["role"] for message in messages]
        raise UserError(
            f"the chat template refuses messages with roles {roles}: {error}; mend the rows or the template"
        ) from None


def render(template: str, messages: list[Message], add_generation_prompt: bool, names: dict[str, str | None]) -> str:
    """Messages as the text that the model reads. `names` holds bos_token, eos_token, … as the template calls them."""
    return _rendered(template, messages, add_generation_prompt, names).replace(_OPEN, "").replace(_CLOSE, "")


def render_with_spans(template: str, messages: list[Message], names: dict[str, str | None]) -> tuple[str, Spans]:
    """The text, and the character spans that the assistant wrote.

    A template with `{% generation %}` says which; without, the span of an assistant message is what rendering it adds to the
    rendering, with generation prompt, of the messages before it. Errors: `BadRow` where a template does neither.
    """
    marked = _rendered(template, messages, False, names)
    if _OPEN in marked:
        return _spans(marked)
    spans: Spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(template, messages[:number], True, names) if number else ""
        after = _rendered(template, messages[: number + 1], False, names)
        if not marked.startswith(after):  # some put end-of-sequence behind the last message, whichever that is (Phi-3)
            after = after.removesuffix(names.get("eos_token") or "")
        if not (after.startswith(before) and marked.startswith(after)):
            raise BadRow(
                "the chat template rewrites earlier messages, so the assistant's tokens cannot be found in a conversation of "
                f"{len(messages)} messages; put {{% generation %}} … {{% endgeneration %}} around them in model.chat_template"
            )
        spans.append((len(before), len(after)))
    return marked, spans


def _spans(marked: str) -> tuple[str, Spans]:
    text, spans = "", []
    for number, piece in enumerate(marked.split(_OPEN)):
        if number:
            inside, _, piece = piece.partition(_CLOSE)
            touches = spans and spans[-1][1] == len(text)  # the one before: of the same message
            spans.append((spans.pop()[0] if touches else len(text), len(text) + len(inside)))
            text += inside
        text += piece
    return text, spans
