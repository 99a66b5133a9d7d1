"""Supervised fine-tuning: the language-modelling loss on the tokens of the answers."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import ops
from rlhf_jax.algorithms.training import Offline
from rlhf_jax.types import Metrics, Params, Sequences


def token_loss(logprobs: jax.Array, target_mask: jax.Array) -> jax.Array:
    """-log p per target token, 0 elsewhere: f32[B, T], nats. Entry t belongs to token t (entry 0 is never a target)."""
    chex.assert_equal_shape([logprobs, target_mask])
    chex.assert_type(target_mask, bool)
    return jnp.where(target_mask, -logprobs.astype(jnp.float32), 0.0)


def denominators(batch: Sequences) -> dict[str, jax.Array]:
    """Target tokens of the global batch, at least 1."""
    return {"tokens": jnp.maximum(jnp.sum(batch.target_mask), 1).astype(jnp.float32)}


def loss(
    apply: Callable[[Params, Any, Sequences], Any], params: Params, frozen: Any, batch: Sequences, counts: dict[str, jax.Array]
) -> tuple[jax.Array, Metrics]:
    """Mean of -log p over all target tokens of the global batch (this part's share), nats.

    `apply(params, frozen, batch)` returns logprobs f32[B, T] (entry t = log-probability of token t), or a pair of them and
    bool[B, T], whether no token was likelier than token t, which adds sft/accuracy.
    """
    out = apply(params, frozen, batch)
    logprobs, correct = out if isinstance(out, tuple) else (out, None)
    share = jnp.sum(token_loss(logprobs, batch.target_mask)) / counts["tokens"]
    metrics = {"sft/loss_nats": share}
    if correct is not None:
        metrics["sft/accuracy"] = ops.masked_sum(correct, batch.target_mask) / counts["tokens"]
    return share, metrics


def build(settings: Any = None) -> Offline:
    """Fine-tuning has one loss and nothing to choose; `settings` is there for the common signature."""
    del settings
    return Offline(loss=loss, denominators=denominators)
