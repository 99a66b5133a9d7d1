"""A model from one function: whoever has a forward pass needs no cache to sample."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.types import Model, Params


def without_cache(
    hidden: Callable[..., jax.Array],
    *,
    vocab_size: int,
    init: Callable[..., Params],
    logits: Callable[[Params, jax.Array], jax.Array],
    score: Callable[[Params, jax.Array], jax.Array],
) -> Model:
    """A `Model` of your own forward pass: the sampler runs it over all tokens again at every step.

    R times the arithmetic of a cache: right for small models, experiments and tests. Padding may stand on either side of the
    tokens and in between, so `hidden` must look at `mask`, never at the place in the array.

    Args:
      hidden: (params, tokens i32[B, T], mask bool[B, T], *, positions=None, segments=None) -> [B, T, D]. `positions` and
        `segments` are given with packed sequences only: what never sees any may leave them out.
      init: (key, *, head="lm" | "score") -> params.
      logits: (params, hidden [..., D]) -> f32[..., V].
      score: (params, hidden [..., D]) -> f32[...], the value of a state or the score of an answer.
    """

    def prefill(params: Params, tokens: jax.Array, mask: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
        return hidden(params, tokens, mask), jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))

    def decode(
        params: Params, seen: jax.Array, token: jax.Array, position: jax.Array, slot: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del position  # `hidden` counts the mask
        seen = jax.lax.dynamic_update_slice(seen, token[:, None].astype(seen.dtype), (0, slot))
        return jax.lax.dynamic_index_in_dim(hidden(params, seen, valid), slot, 1, keepdims=False), seen

    def states(params: Params, tokens: jax.Array, mask: jax.Array, *, last: int | None = None, **packing: Any) -> jax.Array:
        given = {name: x for name, x in packing.items() if x is not None}
        found = hidden(params, tokens, mask, **given)
        return found if last is None else found[:, -last:]

    return Model(vocab_size=vocab_size, init=init, hidden=states, logits=logits, score=score, prefill=prefill, decode=decode)
