"""Reading prompts, and one step with the keys and values of all tokens so far.

Slots: the prompt, padded on either side, takes [0, P); step t writes slot P + t of every row with one update of a slice.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.models import attention as attn
from rlhf_jax.models import rope as ropes
from rlhf_jax.models.stack import Decoder, block, distinct, embed, finish, hidden, kinds, positions_of, share, whole
from rlhf_jax.types import Params


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one entry a layer."""

    keys: list[jax.Array]  # [B, kv_heads, head_dim, S]
    values: list[jax.Array]  # [B, kv_heads, S, head_dim]
    positions: jax.Array  # i32[B, S]


class Replay(NamedTuple):
    """The tokens so far, for models whose rope changes with the length: old keys turn wrong, so every step reads all again."""

    tokens: jax.Array  # i32[B, S]
    positions: jax.Array  # i32[B, S]


def prefill(d: Decoder, params: Params, tokens: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, Cache | Replay]:
    """Read the prompts: states [B, P, D] and a cache of `slots` tokens whose first P are filled.

    Args:
        params: as `for_decoding` leaves them; tokens: i32[B, P]; mask: bool[B, P], padding on either side.
    """
    chex.assert_rank([tokens, mask], 2)
    room = ((0, 0), (0, slots - tokens.shape[1]))
    positions = positions_of(mask)
    if any(ropes.depends_on_length(layer.rope) and slots > (layer.rope.original_length or 0) for layer in d.spec.layers):
        return hidden(d, params, tokens, mask), Replay(jnp.pad(tokens, room), jnp.pad(positions, room))
    shared = share(d, attn.causal(mask.astype(bool), positions, None), bound=slots)
    x = embed(d, params, tokens, positions)
    keys, values = [], []
    for p, kind in zip(params["layers"], kinds(d.spec), strict=True):
        x, (k, v) = block(d, p, x, shared, kind, whole)
        keys.append(jnp.pad(k, (*room, (0, 0), (0, 0))).transpose(_KEYS))
        values.append(jnp.pad(v, (*room, (0, 0), (0, 0))).transpose(_VALUES))
    return finish(d, params, x), Cache(keys, values, jnp.pad(positions, room))


def decode(
    d: Decoder, params: Params, cache: Cache | Replay, token: jax.Array, position: jax.Array, slot: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Cache | Replay]:
    """One more token a row: its state [B, D], and the cache with it.

    Args:
        token, position: i32[B]; slot: i32[], where the cache is written, for all rows alike.
        valid: bool[B, S], slots that hold tokens of the row, in any order (a ring, for one); `slot` itself is always seen.
    """
    chex.assert_rank([token, position, valid], [1, 1, 2])
    seen = valid | (jnp.arange(valid.shape[1])[None] == slot)
    positions = jax.lax.dynamic_update_slice(cache.positions, position[:, None].astype(cache.positions.dtype), (0, slot))
    if isinstance(cache, Replay):
        tokens = jax.lax.dynamic_update_slice(cache.tokens, token[:, None].astype(cache.tokens.dtype), (0, slot))
        place = jnp.argsort(jnp.where(seen, positions, valid.shape[1]), 1)
        x = hidden(d, params, jnp.take_along_axis(tokens, place, 1), jnp.take_along_axis(seen, place, 1))
        return jnp.take_along_axis(x, position[:, None, None], 1)[:, 0], Replay(tokens, positions)
    past = attn.Keys(position[:, None], positions, seen[:, None])
    shared = share(d, past, bound=valid.shape[1])._replace(attend=attn.make_cached(d.spec, past, distinct(d.spec)[1]))
    x = embed(d, params, token[:, None], position[:, None])
    keys, values = [], []
    for p, kind, k, v in zip(params["layers"], kinds(d.spec), cache.keys, cache.values, strict=True):
        x, (k, v) = block(d, p, x, shared, kind, _into(k, v, slot))
        keys.append(k)
        values.append(v)
    return finish(d, params, x)[:, 0], Cache(keys, values, positions)


_KEYS, _VALUES = (0, 2, 3, 1), (0, 2, 1, 3)  # from [B, S, kv_heads, head_dim]


def _into(keys: jax.Array, values: jax.Array, slot: jax.Array) -> Callable:
    """Writes the new key and value into the cache."""

    def write(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            jax.lax.dynamic_update_slice(keys, k.transpose(_KEYS), (0, 0, 0, slot)),
            jax.lax.dynamic_update_slice(values, v.transpose(_VALUES), (0, 0, slot, 0)),
        )

    return write
