"""The actor answers: prefill, then a loop over a static key-value cache that stops when every row has finished.

    token_t ~ filtered softmax(logits(h_t) / temperature),   key of row b at step t = fold_in(fold_in(key, index_b), t)

A row's randomness is a function of (key, prompt index, t) alone, never of the batch, its order, the padding or the mesh. The
log-probabilities are those of the distribution that was sampled, filters included; `Rollout.kept` stores what the filters kept
so that scoring can replay them. Slots [0, P) of the cache hold the left-padded prompt, slot P + t the response's token t, in
every row the same slot: one `dynamic_update_slice` a step. Positions are counted from a row's own first token.

`continuous.py` answers many prompts in few rows by refilling those that have finished.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import config, ops, warp
from rlhf_jax.errors import UserError
from rlhf_jax.types import Model, Params, Prompts, Rollout

Sample = Callable[[Params, Prompts, jax.Array], Rollout]


class Answers(NamedTuple):
    """What the loop has written so far."""

    tokens: jax.Array  # i32[B, R]
    logprobs: jax.Array  # f32[B, R]
    kept: jax.Array | None  # u32[B, R, ceil(V/32)]
    seen: jax.Array | None  # bool[B, V], tokens that stand in the sequence, for the repetition penalty
    length: jax.Array  # i32[B], tokens emitted
    finished: jax.Array  # bool[B]


def make_sampler(
    model: Model,
    sampling: config.Sampling,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    samples: int = 1,
    collect_kept: bool | None = None,
) -> Sample:
    """The function (params, prompts, key) -> Rollout to compile; one program for each shape of prompts.

    With `samples` G > 1 each prompt is prefilled once and answered G times: row b G + g of the rollout is sample g of prompt b,
    and its key folds g in after the index (`Prompts.sample` + g where a batch numbers its prompts). `collect_kept` None stores
    the kept sets exactly when a filter is on.
    Raises UserError where the sampling keys, the stop tokens or the padding token make no sense.
    """
    check(model, sampling, stop_ids, pad_id)

    def sample(params: Params, prompts: Prompts, key: jax.Array) -> Rollout:
        rollout, _ = generate(
            model, sampling, params, prompts, key, stop_ids=stop_ids, pad_id=pad_id, samples=samples, collect_kept=collect_kept
        )
        return rollout

    return sample


def generate(
    model: Model,
    sampling: config.Sampling,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    samples: int = 1,
    collect_kept: bool | None = None,
) -> tuple[Rollout, jax.Array]:
    """Answer the prompts; beside the rollout the number of decoding steps taken, i32[], at most R - 1."""
    prompts = started(prompts)
    params = model.for_decoding(params)
    width, responses = prompts.tokens.shape[1], sampling.max_new_tokens
    hidden, cache = model.prefill(params, prompts.tokens, prompts.mask, width + responses)
    cache = repeat_cache(model, params, cache, prompts, width + responses, samples)
    prompts = repeat_prompts(prompts, samples)
    last = jnp.repeat(hidden[:, -1], samples, axis=0)
    emit = make_emit(model, sampling, params, stop_ids)
    keys = row_keys(key, prompts)
    offset = prompts.mask.sum(-1, dtype=jnp.int32)
    slots = lax.broadcasted_iota(jnp.int32, (1, width + responses), 1)
    in_prompt = jnp.pad(prompts.mask, ((0, 0), (0, responses)))

    def unfinished(state: tuple[jax.Array, Answers, Any]) -> jax.Array:
        t, answers, _ = state
        return (t < responses) & ~answers.finished.all()

    def step(state: tuple[jax.Array, Answers, Any]) -> tuple[jax.Array, Answers, Any]:
        t, answers, cache = state
        slot = width + t - 1
        token = lax.dynamic_index_in_dim(answers.tokens, t - 1, axis=1, keepdims=False)
        valid = in_prompt | ((slots >= width) & (slots <= slot))
        hidden, cache = model.decode(params, cache, token, offset + t - 1, slot, valid)
        return t + 1, emit(answers, hidden, keys, t), cache

    empty = empty_answers(model, sampling, prompts, pad_id, collects(sampling, collect_kept))
    steps, answers, _ = lax.while_loop(unfinished, step, (jnp.int32(1), emit(empty, last, keys, jnp.int32(0)), cache))
    return as_rollout(prompts, answers), steps - 1


def make_emit(
    model: Model, sampling: config.Sampling, params: Params, stop_ids: tuple[int, ...]
) -> Callable[[Answers, jax.Array, jax.Array, jax.Array], Answers]:
    """(answers, hidden[B, D], row keys [B], t) -> answers with token t of every row that is not finished; t is i32[]."""

    def emit(answers: Answers, hidden: jax.Array, keys: jax.Array, t: jax.Array) -> Answers:
        token, logprob, kept = choose(model, sampling, params, stop_ids, hidden, keys, t, answers.seen)
        active = ~answers.finished
        return Answers(
            tokens=put_column(answers.tokens, token, t, active),
            logprobs=put_column(answers.logprobs, logprob, t, active),
            kept=None if answers.kept is None else put_column(answers.kept, ops.pack_kept(kept), t, active),
            seen=None if answers.seen is None else answers.seen | one_hot(token, model.vocab_size),
            length=answers.length + active,
            finished=answers.finished | is_stop(token, stop_ids),
        )

    return emit


def choose(
    model: Model,
    sampling: config.Sampling,
    params: Params,
    stop_ids: tuple[int, ...],
    hidden: jax.Array,
    keys: jax.Array,
    t: jax.Array,
    seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token i32[B], its log-probability f32[B] and the kept tokens bool[B, V]; t i32[] or i32[B] counts emitted tokens."""
    scores = model.logits(params, hidden)
    if seen is not None:
        scores = warp.penalize_repetition(scores, seen, sampling.repetition_penalty)
    if sampling.min_new_tokens > 0 and stop_ids:
        early = jnp.broadcast_to(t < sampling.min_new_tokens, scores.shape[:1])
        stops = is_stop(lax.iota(jnp.int32, model.vocab_size), stop_ids)
        scores = jnp.where(early[:, None] & stops[None], -jnp.inf, scores)
    scores = warp.filtered(scores, sampling)
    times = jnp.broadcast_to(t, scores.shape[:1])
    token, logprob = warp.draw(scores, jax.vmap(jax.random.fold_in)(keys, times) if sampling.temperature > 0 else None)
    return token, logprob, scores > -jnp.inf


def row_keys(key: jax.Array, prompts: Prompts) -> jax.Array:
    """One key a row, [B]: fold_in(key, index), and the number of the sample folded in too where a prompt has several."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(prompts.index)
    return keys if prompts.sample is None else jax.vmap(jax.random.fold_in)(keys, prompts.sample)


def empty_answers(model: Model, sampling: config.Sampling, prompts: Prompts, pad_id: int, kept: bool) -> Answers:
    """No token yet; `seen` starts with the prompt's own tokens, left padding excepted."""
    batch, responses = prompts.tokens.shape[0], sampling.max_new_tokens
    words = -(-model.vocab_size // 32)
    return Answers(
        tokens=jnp.full((batch, responses), pad_id, jnp.int32),
        logprobs=jnp.zeros((batch, responses), jnp.float32),
        kept=jnp.zeros((batch, responses, words), jnp.uint32) if kept else None,
        seen=prompt_tokens_seen(prompts, model.vocab_size) if sampling.repetition_penalty != 1 else None,
        length=jnp.zeros((batch,), jnp.int32),
        finished=jnp.zeros((batch,), bool),
    )


def prompt_tokens_seen(prompts: Prompts, vocab_size: int) -> jax.Array:
    """bool[B, V]: tokens of the prompt; padding is none of them, even where its id is."""
    rows = lax.broadcasted_iota(jnp.int32, prompts.tokens.shape, 0)
    return jnp.zeros((prompts.tokens.shape[0], vocab_size), bool).at[rows, prompts.tokens].max(prompts.mask)


def as_rollout(prompts: Prompts, answers: Answers) -> Rollout:
    """Prompt and response side by side, with the masks."""
    emitted = lax.broadcasted_iota(jnp.int32, answers.tokens.shape, 1) < answers.length[:, None]
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, answers.tokens], axis=1),
        mask=jnp.concatenate([prompts.mask, emitted], axis=1),
        action_mask=emitted,
        finished=answers.finished,
        logprobs=answers.logprobs,
        index=prompts.index,
        kept=answers.kept,
    )


def collects(sampling: config.Sampling, collect_kept: bool | None) -> bool:
    """Whether the rollout carries kept sets: asked for, or some filter removes tokens (greedy answers are not trained on)."""
    if collect_kept is not None:
        return collect_kept
    filters = (sampling.top_k > 0, sampling.top_p < 1, sampling.min_p > 0, sampling.min_new_tokens > 0)
    return sampling.temperature > 0 and any(filters)


def put_column(buffer: jax.Array, values: jax.Array, t: jax.Array, active: jax.Array) -> jax.Array:
    """buffer[b, t] = values[b] in the rows that are active."""
    old = lax.dynamic_index_in_dim(buffer, t, axis=1, keepdims=False)
    new = jnp.where(active.reshape(active.shape + (1,) * (values.ndim - 1)), values, old)
    return lax.dynamic_update_index_in_dim(buffer, new, t, axis=1)


def is_stop(tokens: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    """bool of the shape of `tokens`: one of the stop tokens."""
    stops = jnp.asarray(stop_ids, jnp.int32).reshape((1,) * tokens.ndim + (-1,))
    return (tokens[..., None] == stops).any(-1)


def one_hot(token: jax.Array, vocab_size: int) -> jax.Array:
    """bool[B, V]; a comparison, because a scatter would gather a sharded vocabulary."""
    return token[:, None] == lax.broadcasted_iota(jnp.int32, (1, vocab_size), 1)


def repeat_prompts(prompts: Prompts, samples: int) -> Prompts:
    """Every prompt `samples` times in a row, the copies numbered in `sample`: from 0, or on from the number that it has."""
    if samples == 1:
        return prompts
    number = jnp.arange(prompts.index.shape[0] * samples, dtype=jnp.int32) % samples
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), prompts)
    return repeated.replace(sample=number if repeated.sample is None else repeated.sample + number)


def cache_shapes(model: Model, params: Params, batch: int, width: int, slots: int) -> Any:
    """Shapes and dtypes of the cache of `batch` prompts of `width` tokens with room for `slots`."""
    tokens = jax.ShapeDtypeStruct((batch, width), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, width), jnp.bool_)
    return jax.eval_shape(lambda p, x, m: model.prefill(p, x, m, slots)[1], params, tokens, mask)


def cache_axes(model: Model, params: Params, prompts: Prompts, slots: int) -> tuple[Any, Any]:
    """Which axis of every leaf of the cache is the batch, which the slots (-1: none): found by asking for other sizes."""
    batch, width = prompts.tokens.shape

    def differing(one: jax.ShapeDtypeStruct, other: jax.ShapeDtypeStruct) -> int:
        places = [axis for axis, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if sizes[0] != sizes[1]]
        return places[0] if places else -1

    base = cache_shapes(model, params, batch, width, slots)
    rows = jax.tree.map(differing, base, cache_shapes(model, params, 2 * batch, width, slots))
    other = cache_shapes(model, params, batch, width, slots + 1)
    if jax.tree.structure(other) != jax.tree.structure(base):  # a longer rope begins here
        other = cache_shapes(model, params, batch, width, slots - 1)
    return rows, jax.tree.map(differing, base, other)


def repeat_cache(model: Model, params: Params, cache: Any, prompts: Prompts, slots: int, samples: int) -> Any:
    """The cache of prompts, every row `samples` times: what a group shares is computed once."""
    if samples == 1:
        return cache
    rows, _ = cache_axes(model, params, prompts, slots)
    return jax.tree.map(lambda leaf, axis: leaf if axis < 0 else jnp.repeat(leaf, samples, axis=axis), cache, rows)


def started(prompts: Prompts) -> Prompts:
    """Prompts of which every row has a token: one without any starts from the padding token in its last column.

    Sampler and scorer must condition an empty prompt's first response token on the same thing, so the rollout's mask says so.
    """
    chex.assert_rank([prompts.tokens, prompts.mask, prompts.index], [2, 2, 1])
    chex.assert_equal_shape([prompts.tokens, prompts.mask])
    if prompts.tokens.shape[1] == 0:
        raise UserError("prompts have width 0; the response's first token needs at least one column before it: pad to width 1")
    empty = ~prompts.mask.any(-1)
    return prompts.replace(mask=prompts.mask.at[:, -1].set(prompts.mask[:, -1] | empty))


def check(model: Model, sampling: config.Sampling, stop_ids: tuple[int, ...], pad_id: int) -> None:
    """Raise UserError naming the key, the value, the rule and the remedy."""
    s = sampling
    rules = (
        ("max_new_tokens", s.max_new_tokens, s.max_new_tokens >= 1, "at least 1"),
        ("min_new_tokens", s.min_new_tokens, 0 <= s.min_new_tokens <= s.max_new_tokens, "between 0 and max_new_tokens"),
        ("temperature", t := s.temperature, t == 0 or t >= config.COLDEST, f"0 (greedy) or at least {config.COLDEST:g}"),
        ("top_k", s.top_k, s.top_k >= 0, "0 (all tokens) or more"),
        ("top_p", s.top_p, 0 <= s.top_p <= 1, "between 0 and 1 (all tokens)"),
        ("min_p", s.min_p, 0 <= s.min_p <= 1, "between 0 (all tokens) and 1"),
        ("repetition_penalty", s.repetition_penalty, s.repetition_penalty > 0, "more than 0; 1 is none"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise UserError(f"sampling.{name} is {value}; it must be {rule}")
    for name, token in (("pad token", pad_id), *(("stop token", stop) for stop in stop_ids)):
        if not 0 <= token < model.vocab_size:
            raise UserError(
                f"{name} {token} is outside the model's vocabulary of {model.vocab_size}; use the model's own tokenizer"
            )
