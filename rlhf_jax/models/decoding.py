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
from rlhf_jax.models.stack import Decoder, block, embed, finish, hidden, kinds, positions_of, share, whole
from rlhf_jax.types import Params


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one entry a layer."""

    keys: list[jax.Array]  # [B, S, kv_heads, head_dim]
    values: list[jax.Array]
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
        keys.append(jnp.pad(k, (*room, (0, 0), (0, 0))))
        values.append(jnp.pad(v, (*room, (0, 0), (0, 0))))
    return finish(d, params, x), Cache(keys, values, jnp.pad(positions, room))


def decode(
    d: Decoder, params: Params, cache: Cache | Replay, token: jax.Array, position: jax.Array, slot: jax.Array, valid: jax.Array
) -> tuple[jax.Array, Cache | Replay]:
    """One more token a row: its state [B, D], and the cache with it.

    Args:
        token, position: i32[B]; slot: i32[], where the cache is written, for all rows alike.
        valid: bool[B, S], slots that hold tokens of the row; later slots are ignored and `slot` itself is always seen.
    """
    chex.assert_rank([token, position, valid], [1, 1, 2])
    order = jnp.arange(valid.shape[1])[None]
    seen = (valid & (order < slot)) | (order == slot)
    positions = jax.lax.dynamic_update_slice(cache.positions, position[:, None].astype(cache.positions.dtype), (0, slot))
    if isinstance(cache, Replay):
        tokens = jax.lax.dynamic_update_slice(cache.tokens, token[:, None].astype(cache.tokens.dtype), (0, slot))
        x = hidden(d, params, tokens, seen, positions=jnp.where(seen, positions, 0))
        return jax.lax.dynamic_index_in_dim(x, slot, 1, keepdims=False), Replay(tokens, positions)
    shared = share(d, attn.Keys(position[:, None], positions, seen[:, None]), bound=valid.shape[1])
    x = embed(d, params, token[:, None], position[:, None])
    keys, values = [], []
    for p, kind, k, v in zip(params["layers"], kinds(d.spec), cache.keys, cache.values, strict=True):
        x, (k, v) = block(d, p, x, shared, kind, _into(k, v, slot))
        keys.append(k)
        values.append(v)
    return finish(d, params, x)[:, 0], Cache(keys, values, positions)


def _into(keys: jax.Array, values: jax.Array, slot: jax.Array) -> Callable:
    """Writes the new key and value into the cache."""
    at = (0, slot, 0, 0)
    return lambda k, v: (jax.lax.dynamic_update_slice(keys, k, at), jax.lax.dynamic_update_slice(values, v, at))
