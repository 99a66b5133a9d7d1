"""A conversation in the terminal: `rlhf-jax chat`. Where standard input is no terminal, one answer a line."""

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import jax

from rlhf_jax import config
from rlhf_jax.data.formats import Message
from rlhf_jax.errors import UserError
from rlhf_jax.generate import PLAIN_CHAT, encode_conversation, open_model
from rlhf_jax.streaming import Ask, Streamer, context_of

HELP = (
    "/reset forgets the conversation, /system TEXT sets the system message, /quit leaves; Ctrl-C stops an answer, Ctrl-D leaves"
)


@dataclass
class Conversation:
    """What was said so far, and how the model answers."""

    streamer: Streamer
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    messages: list[Message] = field(default_factory=list)
    answers: int = 0

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer to a message. Both are remembered, also where the answer was broken off.

        Errors: `UserError`, and nothing is remembered, where the conversation has become longer than the model takes.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids, stops = encode_conversation(self.streamer.generator.tokenizer, asked)
        try:
            room = self.streamer.room(ids)
        except UserError as error:
            raise UserError(f"{error}; /reset starts afresh") from None
        ask = Ask(
            ids=ids,
            max_tokens=min(self.max_new_tokens, room),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed + self.answers,
            stop=stops,
        )
        self.answers += 1
        said = ""
        stream = self.streamer.stream(ask)
        try:
            for piece in stream:
                said += piece.text
                yield piece.text
        finally:
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def system(self, text: str) -> None:
        """Set the system message (nothing: none); what was said stays."""
        spoken = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *spoken] if text else spoken

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]


def chat(
    model_dir: Path,
    *,
    system: str = "",
    max_new_tokens: int = 512,
    max_length: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Any = "float32",
) -> None:
    """Talk until /quit or the end of the input. Raises `UserError` where the directory is no language model."""
    settings = config.Model(path=str(model_dir), compute_dtype=dtype)
    generator = open_model(model_dir, settings, mesh=config.Mesh(data=1, fsdp=1), devices=jax.devices()[:1])
    streamer = Streamer(generator, context_of(generator, max_length))
    conversation = Conversation(streamer, max_new_tokens, temperature, top_p, seed)
    conversation.system(system)
    if generator.tokenizer.chat_template is None:
        sys.stderr.write(f"rlhf-jax: {PLAIN_CHAT}\n")
    if sys.stdin.isatty():
        talk(conversation, str(model_dir))
    else:
        answer_lines(conversation, sys.stdin, sys.stdout)


def command(conversation: Conversation, line: str) -> str | None:
    """Obey a line that begins with /: what to say about it, or None: leave. Errors: `UserError` for an unknown one."""
    name, _, rest = line.strip().partition(" ")
    if name == "/quit":
        return None
    if name == "/reset":
        conversation.reset()
        return "forgotten"
    if name == "/system":
        conversation.system(rest.strip())
        return "system message set" if rest.strip() else "no system message"
    if name == "/help":
        return HELP
    raise UserError(f"{name} is no command; {HELP}")


def answer_lines(conversation: Conversation, source: TextIO, out: TextIO) -> None:
    r"""One answer a line, line breaks in it written as \n, to a blank line a blank one.

    Commands are obeyed in silence, mistakes raised.
    """
    for line in _lines(source):
        if line.startswith("/"):
            if command(conversation, line) is None:
                return
        else:
            text = "".join(conversation.answer(line.rstrip("\n"))) if line.strip() else ""
            out.write(printable(text).strip().replace("\n", "\\n") + "\n")
            out.flush()


def _lines(source: TextIO) -> Iterator[str]:
    try:
        yield from source
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding}: {error.reason}; PYTHONIOENCODING names another") from None


def talk(conversation: Conversation, name: str) -> None:
    """Questions and answers on a terminal, with history and editing where the platform has readline."""
    from rich.console import Console

    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    console.print(f"[bold]{_escaped(name)}[/]  [dim]{_escaped(HELP)}[/]")
    while True:
        try:
            line = console.input("[bold cyan]you[/]    ")
            if not line.startswith("/"):
                if line.strip():
                    show(console, conversation.answer(line))
                continue
            said = command(conversation, line)
            if said is None:
                return
            console.print(said, style="dim", markup=False)
        except UserError as error:
            console.print(str(error), style="red", markup=False)
        except KeyboardInterrupt:
            console.print()
        except EOFError:
            console.print()
            return


def show(console: Any, pieces: Generator[str, None, None], clock: Callable[[], float] = time.monotonic) -> None:
    """Print an answer while it grows; Ctrl-C stops it."""
    began, shown, note = clock(), "", ""
    console.print("[bold green]model[/]  ", end="")
    try:
        for piece in pieces:
            text = printable(piece) if shown else printable(piece).lstrip()
            console.print(text, end="", markup=False)
            shown += text
    except KeyboardInterrupt:
        pieces.close()
        note = "stopped, "
    console.print()
    console.print(f"{note}{len(shown)} characters in {clock() - began:.1f} s", style="dim")


def printable(text: str) -> str:
    """Text without control characters but line breaks and tabs: a model cannot write escape sequences to the terminal."""
    return "".join(char for char in text if char in "\n\t" or not (ord(char) < 32 or 127 <= ord(char) < 160))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
