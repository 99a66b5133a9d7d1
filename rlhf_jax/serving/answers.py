"""Pieces of answers as OpenAI's objects: whole, and as chunks of a stream."""

import codecs
import secrets
import time
from collections.abc import Iterable
from typing import Any

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.streaming import Piece, Token


class Reply:
    """One answer to a request: the same id, time and model in every object of it."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, chat: bool, top: int | None):
        self.model, self.tokenizer, self.chat, self.top = model, tokenizer, chat, top
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.special = {n for n, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
        self.texts: dict[int, tuple[Any, int]] = {}  # of each choice: decoder of its bytes, characters that it has given

    def whole(self, pieces: Iterable[Piece], prompt_tokens: int, count: int) -> dict[str, Any]:
        """The object of an answer that is not streamed; `count` choices, numbered by `Piece.sample`."""
        by_choice: list[list[Piece]] = [[] for _ in range(count)]
        for piece in pieces:
            by_choice[piece.sample].append(piece)
        choices, total = [], 0
        for index, found in enumerate(by_choice):
            text = "".join(piece.text for piece in found)
            tokens = tuple(token for piece in found for token in piece.tokens)
            total += len(tokens)
            body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **body, "logprobs": self.logprobs(tokens, index), "finish_reason": found[-1].finish})
        return self._object("", choices) | {"usage": usage(prompt_tokens, total)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice of a chat, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._object(".chunk", [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece as a chunk."""
        body = {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        choice = {
            "index": piece.sample,
            **body,
            "logprobs": self.logprobs(piece.tokens, piece.sample),
            "finish_reason": piece.finish,
        }
        return self._object(".chunk", [choice])

    def closing(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The chunk that ends a stream with its usage, where the client asked for it."""
        return self._object(".chunk", []) | {"usage": usage(prompt_tokens, completion_tokens)}

    def logprobs(self, tokens: tuple[Token, ...], choice: int) -> dict[str, Any] | None:
        """Log-probabilities of a choice's next tokens under the model itself, nats; None where they were not asked for.

        A token has one name wherever it stands: one that begins a word has its space, also where the text begins with it.
        """
        if self.top is None:
            return None
        if self.chat:
            rows = [
                self._named(token.id, token.logprob) | {"top_logprobs": [self._named(*pair) for pair in token.top[: self.top]]}
                for token in tokens
            ]
            return {"content": rows, "refusal": None}
        return {
            "tokens": [_name(self.tokenizer.piece(token.id)) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {_name(self.tokenizer.piece(number)): value for number, value in token.top[: self.top]} for token in tokens
            ],
            "text_offset": [self._offset(token.id, choice) for token in tokens],
        }

    def _named(self, number: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.piece(number)
        return {"token": _name(raw), "bytes": list(raw), "logprob": logprob}

    def _offset(self, number: int, choice: int) -> int:
        """Characters of the choice's text before its next token, which is `number`."""
        decoder, at = self.texts.get(choice, (codecs.getincrementaldecoder("utf-8")("replace"), 0))
        if number not in self.special:
            raw = self.tokenizer.piece(number)
            if choice not in self.texts and raw.startswith(b" "):  # which the text may have lost
                raw = self.tokenizer.decode([number]).encode()
            self.texts[choice] = decoder, at + len(decoder.decode(raw))
        return at

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}


def _name(raw: bytes) -> str:
    """A token's text, or, as OpenAI writes parts of a character, "bytes:\\xe2\\x80"."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
