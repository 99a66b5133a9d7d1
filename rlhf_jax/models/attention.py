"""Which key a query sees, and softmax attention over those."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.spec import Spec

Attend = Callable[..., jax.Array]  # (q, k, v, window index, scale, sinks or None) -> [B, T, heads, head_dim]

_LOW = -0.7 * float(np.finfo(np.float32).max)  # finite: a row that sees nothing gets a uniform softmax, not NaN


class Keys(NamedTuple):
    """What masks and position biases are made of. Queries are rows t, keys rows s."""

    query_positions: jax.Array  # i32[B, T]
    key_positions: jax.Array  # i32[B, S]
    visible: jax.Array  # bool[B, T, S], causal, without padding, within the segment
    segments: jax.Array | None = None  # i32[B, T], 0 on padding; None: queries and keys are not the same tokens (decoding)


def make_dense(spec: Spec, keys: Keys, windows: list[int | None]) -> Attend:
    """Attention of one call. The layer says by number which of the windows is its own; q may be of the last tokens only."""
    visible = tuple(within_window(keys, window) for window in windows)
    bias = position_bias(spec, keys) if spec.positions == "alibi" else None

    def apply(q: jax.Array, k: jax.Array, v: jax.Array, window: Any, scale: Any, sinks: jax.Array | None) -> jax.Array:
        n = q.shape[1]
        seen, distance = pick(visible, window)[:, -n:], None if bias is None else bias[:, :, -n:]
        return attend(q, k, v, seen, scale=scale, cap=spec.attention_cap, bias=distance, sinks=sinks)

    return apply


def make_cached(spec: Spec, keys: Keys, windows: list[int | None]) -> Attend:
    """As `make_dense` for one query a row, with keys and values as the cache holds them (see `attend_cached`)."""
    visible = tuple(within_window(keys, window)[:, 0] for window in windows)
    bias = position_bias(spec, keys)[:, :, 0] if spec.positions == "alibi" else None

    def apply(q: jax.Array, k: jax.Array, v: jax.Array, window: Any, scale: Any, sinks: jax.Array | None) -> jax.Array:
        seen = pick(visible, window)
        return attend_cached(q[:, 0], k, v, seen, scale=scale, cap=spec.attention_cap, bias=bias, sinks=sinks)[:, None]

    return apply


def pick(choices: tuple[jax.Array, ...], index: Any) -> jax.Array:
    """One of a few arrays, by a Python number or a traced one."""
    if len(choices) == 1:
        return choices[0]
    return choices[index] if isinstance(index, int) else jax.lax.select_n(index, *choices)


def causal(mask: jax.Array, positions: jax.Array, segments: jax.Array | None) -> Keys:
    """Keys of a whole sequence: earlier tokens of the same segment.

    Args:
        mask: bool[B, T], True on tokens; positions: i32[B, T]; segments: i32[B, T] or None.
    """
    order = jnp.arange(mask.shape[1])
    visible = (order[None, :, None] >= order[None, None, :]) & mask[:, None, :]
    if segments is not None:
        visible &= segments[:, :, None] == segments[:, None, :]
    return Keys(positions, positions, visible, jnp.where(mask, 1 if segments is None else segments + 1, 0))


def within_window(keys: Keys, window: int | None) -> jax.Array:
    """bool[B, T, S]: visible keys fewer than `window` tokens back.

    Distances are of positions, not of array indices, so that padding between two tokens does not shrink the window;
    where there are no holes both are the same.
    """
    if window is None:
        return keys.visible
    return keys.visible & (keys.query_positions[:, :, None] - keys.key_positions[:, None, :] < window)


def alibi_slopes(heads: int) -> np.ndarray:
    """f32[heads], of the linear position bias (arXiv 2108.12409; the rule for head counts that are no power of two)."""
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** -(2.0 ** -(math.log2(power) - 3))
    slopes = [base**i for i in range(1, power + 1)]
    if power < heads:
        base = 2.0 ** -(2.0 ** -(math.log2(2 * power) - 3))
        slopes += [base**i for i in range(1, 2 * (heads - power) + 1, 2)]
    return np.asarray(slopes, np.float32)


def position_bias(spec: Spec, keys: Keys) -> jax.Array:
    """f32[B, heads, T, S]: scale * slope * (key position - query position).

    `alibi_rounds`: slope, position and their product are each rounded to bfloat16, as transformers computes Falcon's
    (`build_alibi_tensor`, of the key alone: what is taken off for the query is one number a row, which no softmax sees).
    """
    scale, slopes = np.float32(spec.alibi_scale), jnp.asarray(alibi_slopes(spec.heads))[None, :, None, None]
    q = keys.query_positions[:, None, :, None].astype(jnp.float32)
    k = keys.key_positions[:, None, None, :].astype(jnp.float32)
    if not spec.alibi_rounds:
        return slopes * scale * (k - q)
    rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)  # XLA may leave out a pair of casts
    return scale * (rounded(rounded(slopes) * rounded(k)) - rounded(rounded(slopes) * rounded(q)))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    scale: jax.Array | float,
    cap: float | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """softmax(cap(q k * scale) + bias) v, softmax in float32, [B, T, heads, head_dim].

    Args:
        q: [B, T, heads, head_dim]; k, v: [B, S, kv_heads, head_dim]; head h reads key-value head h // (heads / kv_heads).
        visible: bool[B, T, S]; bias: f32[B, heads, T, S].
        scale: f32[]; cap: scores become cap tanh(scores / cap); sinks: [heads], score of a column without a value.
    """
    rows, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # Both products in the order of a batched matrix product, so that only q, k, v are transposed, never the scores.
    q = q.reshape(rows, queries, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    weights = _weights(scores, visible, cap, bias, sinks)
    out = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, head_dim)


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    scale: jax.Array | float,
    cap: float | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`attend` for one query a row, [B, heads, head_dim], with keys and values laid out as its two products read them.

    A product with the query's length of 1 among its axes, or over keys laid out [B, S, kv_heads, head_dim], copies the whole
    cache at every layer of every step: on a CPU 7 times the time at S = 128, 4 times at S = 320.

    Args:
        q: [B, heads, head_dim]; k: [B, kv_heads, head_dim, S]; v: [B, kv_heads, S, head_dim].
        visible: bool[B, S]; bias: f32[B, heads, S]; scale, cap, sinks as in `attend`.
    """
    rows, heads, head_dim = q.shape
    kv_heads = v.shape[1]
    q = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bkgh,bkhs->bkgs", q, k, preferred_element_type=jnp.float32) * scale
    weights = _weights(scores, visible, cap, bias, sinks)
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(v.dtype), v).reshape(rows, heads, head_dim)


def _weights(
    scores: jax.Array, visible: jax.Array, cap: float | None, bias: jax.Array | None, sinks: jax.Array | None
) -> jax.Array:
    """Softmax over keys: scores f32[B, kv_heads, heads / kv_heads, ..., S], visible bool[B, ..., S], the rest as in `attend`."""
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores += bias.reshape(scores.shape)
    scores = jnp.where(visible[:, None, None], scores, _LOW)
    if sinks is None:
        return jax.nn.softmax(scores, -1)
    column = sinks.astype(jnp.float32).reshape(1, scores.shape[1], -1, *(1 for _ in scores.shape[3:]))
    column = jnp.broadcast_to(column, (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, column], -1), -1)[..., :-1]
