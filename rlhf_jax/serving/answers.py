"""Pieces of answers as OpenAI's objects: whole, and as chunks of a stream."""

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
            choices.append({"index": index, **body, "logprobs": self.logprobs(tokens, 0), "finish_reason": found[-1].finish})
        return self._object("", choices) | {"usage": usage(prompt_tokens, total)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice of a chat, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._object(".chunk", [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, piece: Piece, offset: int) -> dict[str, Any]:
        """A piece as a chunk; `offset` counts the characters of the choice before it."""
        body = {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        choice = {"index": piece.sample, **body, "logprobs": self.logprobs(piece.tokens, offset), "finish_reason": piece.finish}
        return self._object(".chunk", [choice])

    def closing(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The chunk that ends a stream with its usage, where the client asked for it."""
        return self._object(".chunk", []) | {"usage": usage(prompt_tokens, completion_tokens)}

    def logprobs(self, tokens: tuple[Token, ...], offset: int) -> dict[str, Any] | None:
        """Log-probabilities of tokens under the model itself, nats; None where they were not asked for."""
        if self.top is None:
            return None
        if self.chat:
            rows = [
                self._named(token.id, token.logprob) | {"top_logprobs": [self._named(*pair) for pair in token.top[: self.top]]}
                for token in tokens
            ]
            return {"content": rows, "refusal": None}
        names = [self._name(token.id) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._name(number): value for number, value in token.top[: self.top]} for token in tokens],
            "text_offset": [offset + sum(map(len, names[:place])) for place in range(len(names))],
        }

    def _named(self, number: int, logprob: float) -> dict[str, Any]:
        name = self._name(number)
        return {"token": name, "bytes": None if "\ufffd" in name else list(name.encode()), "logprob": logprob}

    def _name(self, number: int) -> str:
        return self.tokenizer.decode([number], skip_special=False)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
