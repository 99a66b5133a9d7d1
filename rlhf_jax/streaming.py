"""One prompt answered piece by piece: what `rlhf-jax chat` and `rlhf-jax serve` show while the model still thinks.

The prompt is prefilled once, then chunks of decoding steps run over one cache that every call donates to the next. Temperature
and top-p are arguments of the programs, and lengths are rounded up to powers of two, so that a day of different requests needs
a handful of programs. The tokens are those of `sampling.make_sampler` for the same key: both draw with
fold_in(fold_in(key, index), t).

    start(params, prompt[1, P], key, dial)       -> State, Emitted      prefill, first token; one program for each (P, S, n)
    advance(params, State, dial, limit)          -> State, Emitted      up to CHUNK more tokens; one program for each (S, n)

Text leaves in pieces that never split a character and never show the beginning of a stop string.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rlhf_jax import config, parallel, sampling, warp
from rlhf_jax.errors import UserError
from rlhf_jax.generate import Generator, left_padded
from rlhf_jax.types import Model, Params, Prompts

CHUNK = 16  # decoding steps between two looks of the host
SHORTEST = 32  # tokens; prompts and caches are this long or a power of two times it
TOP = 20  # likeliest tokens reported beside the chosen one, where they are asked for
SAMPLES = 16  # answers to one prompt at one time
UNKNOWN_LENGTH = 4096  # tokens, for a model whose config.json names no length
_IMPOSSIBLE = -1e29  # log-probability, nats: rows of the embedding beyond the tokenizer are below it


class Ask(NamedTuple):
    """A prompt and how it is to be answered."""

    ids: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1
    stop: tuple[str, ...] = ()  # strings, in the text of the answer; they are not part of it
    top: bool = False  # report the TOP likeliest tokens of every step


class Token(NamedTuple):
    """A token of an answer; log-probabilities are the model's own, before temperature and top-p, in nats."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # likeliest first


class Piece(NamedTuple):
    """What an answer has grown by."""

    sample: int
    text: str
    tokens: tuple[Token, ...]
    finish: str | None = None  # "stop": end-of-sequence or a stop string; "length": max_tokens


class Dial(NamedTuple):
    """Settings of the draw that are arguments, not constants, of the programs."""

    temperature: Any  # f32[]; 0: the likeliest token
    top_p: Any  # f32[]; 1: all tokens


class State(NamedTuple):
    """Answers under way."""

    t: jax.Array  # i32[], tokens emitted by every row
    width: jax.Array  # i32[], P: slots of the prompt
    token: jax.Array  # i32[n], last token
    finished: jax.Array  # bool[n]
    offset: jax.Array  # i32[n], tokens of the prompt
    in_prompt: jax.Array  # bool[n, S], slots that hold the prompt
    keys: jax.Array  # key[n]
    cache: Any


class Emitted(NamedTuple):
    """Tokens of a call, the first `steps` columns of them."""

    steps: jax.Array  # i32[]
    tokens: jax.Array  # i32[n, C]
    logprobs: jax.Array  # f32[n, C]
    top_ids: jax.Array | None  # i32[n, C, TOP]
    top_logprobs: jax.Array | None  # f32[n, C, TOP]


def filtered(logits: jax.Array, dial: Dial) -> jax.Array:
    """`warp.filtered` with temperature and top-p as arrays: scores f32[n, V], -inf where a token is not kept."""
    scores = logits / jnp.where(dial.temperature > 0, dial.temperature, 1.0)
    return lax.cond(dial.top_p < 1, lambda s: jnp.where(warp.keep_top_p(s, dial.top_p), s, -jnp.inf), lambda s: s, scores)


def pick(
    model: Model, params: Params, hidden: jax.Array, keys: jax.Array, t: jax.Array, dial: Dial, top: int
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Token i32[n], its log-probability f32[n], and the `top` likeliest tokens with theirs (None: 0 of them)."""
    logits = model.logits(params, hidden)
    now = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)
    token = lax.cond(
        dial.temperature > 0,
        lambda: warp.draw(filtered(logits, dial), now)[0],
        lambda: warp.draw(logits, None)[0],
    )
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    if not top:
        return token, chosen, None
    best, ids = lax.top_k(logprobs, min(top, model.vocab_size))
    return token, chosen, (ids, best)


def make_start(
    model: Model, *, stop_ids: tuple[int, ...], slots: int, samples: int, top: int
) -> Callable[[Params, Prompts, jax.Array, Dial], tuple[State, Emitted]]:
    """(decoding params, one prompt, key, dial) -> state and first token of `samples` answers, with a cache of `slots`."""

    def start(params: Params, prompt: Prompts, key: jax.Array, dial: Dial) -> tuple[State, Emitted]:
        prompt = sampling.started(prompt)
        width = prompt.tokens.shape[1]
        hidden, cache = model.prefill(params, prompt.tokens, prompt.mask, slots)
        cache = sampling.repeat_cache(model, params, cache, prompt, slots, samples)
        rows = sampling.repeat_prompts(prompt, samples)
        keys = sampling.row_keys(key, rows)
        token, logprob, best = pick(model, params, jnp.repeat(hidden[:, -1], samples, axis=0), keys, jnp.int32(0), dial, top)
        state = State(
            t=jnp.int32(1),
            width=jnp.int32(width),
            token=token,
            finished=sampling.is_stop(token, stop_ids),
            offset=rows.mask.sum(-1, dtype=jnp.int32),
            in_prompt=jnp.pad(rows.mask, ((0, 0), (0, slots - width))),
            keys=keys,
            cache=cache,
        )
        ids, values = (None, None) if best is None else (best[0][:, None], best[1][:, None])
        return state, Emitted(jnp.int32(1), token[:, None], logprob[:, None], ids, values)

    return start


def make_advance(
    model: Model, *, stop_ids: tuple[int, ...], top: int
) -> Callable[[Params, State, Dial, jax.Array], tuple[State, Emitted]]:
    """(decoding params, state, dial, limit i32[]) -> the state `limit` <= CHUNK tokens later, or when all rows have ended."""

    def advance(params: Params, state: State, dial: Dial, limit: jax.Array) -> tuple[State, Emitted]:
        rows, slots = state.in_prompt.shape
        order = lax.broadcasted_iota(jnp.int32, (1, slots), 1)
        best = (rows, CHUNK, min(top, model.vocab_size))
        empty = Emitted(
            steps=jnp.int32(0),
            tokens=jnp.zeros((rows, CHUNK), jnp.int32),
            logprobs=jnp.zeros((rows, CHUNK), jnp.float32),
            top_ids=jnp.zeros(best, jnp.int32) if top else None,
            top_logprobs=jnp.zeros(best, jnp.float32) if top else None,
        )

        def more(carry: tuple[State, Emitted]) -> jax.Array:
            now, out = carry
            return (out.steps < limit) & ~now.finished.all()

        def step(carry: tuple[State, Emitted]) -> tuple[State, Emitted]:
            now, out = carry
            slot = now.width + now.t - 1
            valid = now.in_prompt | ((order >= now.width) & (order <= slot))
            hidden, cache = model.decode(params, now.cache, now.token, now.offset + now.t - 1, slot, valid)
            token, logprob, found = pick(model, params, hidden, now.keys, now.t, dial, top)
            everywhere = jnp.ones((rows,), bool)

            def put(buffer: jax.Array | None, values: jax.Array) -> Any:
                return None if buffer is None else sampling.put_column(buffer, values, out.steps, everywhere)

            ids, values = (token, logprob) if found is None else found  # not written where nothing was asked for
            out = Emitted(
                out.steps + 1,
                put(out.tokens, token),
                put(out.logprobs, logprob),
                put(out.top_ids, ids),
                put(out.top_logprobs, values),
            )
            ended = now.finished | sampling.is_stop(token, stop_ids)
            return now._replace(t=now.t + 1, token=token, finished=ended, cache=cache), out

        return lax.while_loop(more, step, (state, empty))

    return advance


def context_of(generator: Generator, wanted: int | None = None) -> int:
    """Tokens of prompt and answer together: what is wanted, at most what the model is described for."""
    described = generator.loaded.spec.max_length or UNKNOWN_LENGTH
    if wanted is not None and not 2 <= wanted <= described:
        raise UserError(f"--max-length {wanted}: must lie between 2 and {described}, the length the model is described for")
    return wanted or described


def rounded(tokens: int) -> int:
    """The length of the program that takes so many tokens."""
    return max(SHORTEST, 1 << (max(tokens, 1) - 1).bit_length())


@dataclass
class Streamer:
    """A loaded model that answers in pieces; compiled programs are kept by their shapes."""

    generator: Generator
    max_length: int  # tokens of prompt and answer together
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def program(self, *key: Any) -> Any:
        """("start", slots, samples, top) or ("advance", top), jitted."""
        if key not in self.compiled:
            model, stops, mesh = self.generator.loaded.model, self.generator.tokenizer.eos_ids, self.generator.mesh
            out = parallel.replicated(mesh) if mesh.size == 1 else None  # on several devices the compiler splits the cache
            if key[0] == "start":
                made = make_start(model, stop_ids=stops, slots=key[1], samples=key[2], top=key[3])
                self.compiled[key] = parallel.compile_step(made, out=out)
            else:
                made = make_advance(model, stop_ids=stops, top=key[1])
                self.compiled[key] = parallel.compile_step(made, out=out, donate=(1,))
        return self.compiled[key]

    def room(self, ids: Sequence[int]) -> int:
        """Tokens that an answer to this prompt may have. Errors: `UserError` where there is no room for any."""
        left = self.max_length - max(len(ids), 1)
        if left < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the model takes {self.max_length}, answer included; shorten the prompt"
            )
        return left

    def stream(self, ask: Ask) -> Iterator[Piece]:
        """Answer a prompt; every sample ends with one piece that has `finish`. Stops computing when it is closed.

        Errors: `UserError`, before anything runs, for a prompt that is too long or settings that make no sense.
        """
        self.check(ask)
        return self._stream(ask)

    def check(self, ask: Ask) -> None:
        """Raise `UserError` where `stream` would."""
        check(ask, self.room(ask.ids), self.generator.tokenizer.vocab_size)

    def _stream(self, ask: Ask) -> Iterator[Piece]:
        width, top = rounded(len(ask.ids)), TOP if ask.top else 0
        rows = 1 << (ask.samples - 1).bit_length()
        prompt = left_padded([ask.ids], width, 1, self.generator.tokenizer.pad_id, 0)
        params, dial = self.generator.loaded.params, Dial(np.float32(ask.temperature), np.float32(ask.top_p))
        start = self.program("start", rounded(width + ask.max_tokens), rows, top)
        state, out = start(params, prompt, jax.random.key(ask.seed), dial)
        answers = [Answer(self.generator.tokenizer, ask) for _ in range(ask.samples)]
        limit, emitted = 1, 1
        while True:
            found = parallel.fetch(out)
            for sample, answer in enumerate(answers):
                if answer.finish is None:
                    text, tokens = answer.grow(_tokens(found, sample))
                    if text or tokens:
                        yield Piece(sample, text, tokens, answer.finish)
            if all(answer.finish for answer in answers):
                return
            limit = min(2 * limit, CHUNK, ask.max_tokens - emitted)
            state, out = self.program("advance", top)(params, state, dial, np.int32(limit))
            emitted += limit


def check(ask: Ask, room: int, vocab_size: int) -> None:
    """Raise `UserError` naming the setting, its value and the rule."""
    wrong = [number for number in ask.ids if not 0 <= number < vocab_size][:1]
    rules = (
        ("max_tokens", ask.max_tokens, 1 <= ask.max_tokens <= room, f"between 1 and {room}, what the prompt leaves of the model"),
        ("temperature", t := ask.temperature, t == 0 or t >= config.COLDEST, f"0 (greedy) or at least {config.COLDEST:g}"),
        ("top_p", ask.top_p, 0 <= ask.top_p <= 1, "between 0 and 1 (all tokens)"),
        ("n", ask.samples, 1 <= ask.samples <= SAMPLES, f"between 1 and {SAMPLES}"),
        ("stop", ask.stop, all(ask.stop), "strings of at least one character"),
        ("seed", ask.seed, 0 <= ask.seed < 2**63, "between 0 and 2^63 - 1"),
        ("a token id of the prompt", wrong, not wrong, f"between 0 and {vocab_size - 1}"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise UserError(f"{name} is {value}; it must be {rule}")


@dataclass
class Answer:
    """The text of one answer while it grows."""

    tokenizer: Any
    ask: Ask
    ids: list[int] = field(default_factory=list)
    sent: int = 0  # characters that have left
    finish: str | None = None

    def grow(self, tokens: Sequence[Token]) -> tuple[str, tuple[Token, ...]]:
        """Take tokens in: the text that may be shown now, and those of the tokens that belong to the answer."""
        eos = self.tokenizer.eos_ids
        ended = next((n + 1 for n, token in enumerate(tokens) if token.id in eos), None)
        taken = list(tokens[: min(ended or len(tokens), self.ask.max_tokens - len(self.ids))])
        before, self.ids = self.ids, self.ids + [token.id for token in taken]
        last = taken[-1].id in eos if taken else False
        full = not last and len(self.ids) == self.ask.max_tokens
        text, stopped = readable(self.tokenizer.decode(self.ids), self.ask.stop, final=last or full)
        if stopped:
            used = next(n for n in range(1, len(taken) + 1) if self._holds_stop(self.ids[: len(before) + n]))
            taken, self.ids = taken[:used], self.ids[: len(before) + used]
        self.finish = "stop" if stopped or last else "length" if full else None
        piece, self.sent = text[self.sent :], max(self.sent, len(text))
        return piece, tuple(taken)

    def _holds_stop(self, ids: list[int]) -> bool:
        return readable(self.tokenizer.decode(ids), self.ask.stop, final=False)[1]


def readable(text: str, stops: Sequence[str], *, final: bool) -> tuple[str, bool]:
    """What may be shown of a growing text, and whether a stop string has ended it.

    Before the end a character whose last bytes are still to come (U+FFFD) and the beginning of a stop string are held back.
    """
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], True
    if final:
        return text, False
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held], False


def _tokens(found: Any, row: int) -> list[Token]:
    """The tokens of one row of an `Emitted` on the host."""
    tokens = []
    for step in range(int(found.steps)):
        top: tuple[tuple[int, float], ...] = ()
        if found.top_ids is not None:
            pairs = zip(found.top_ids[row, step].tolist(), found.top_logprobs[row, step].tolist(), strict=True)
            top = tuple((number, value) for number, value in pairs if value > _IMPOSSIBLE)
        tokens.append(Token(int(found.tokens[row, step]), float(found.logprobs[row, step]), top))
    return tokens
