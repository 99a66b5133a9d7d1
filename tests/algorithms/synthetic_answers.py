"""Rollouts and updates made from nothing but arrays, for tests of algorithms without a model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import ops
from rlhf_jax.algorithms.training import Algorithm
from rlhf_jax.programs import init_run_state
from rlhf_jax.types import Experience, Frozen, Metrics, Rollout, RunState, Scored, Sequences


def rollout(mask: Any, logprobs: Any = None, finished: Any = None) -> Rollout:
    """One prompt token and R response tokens whose ids mean nothing."""
    mask = jnp.asarray(mask, bool)
    whole = jnp.concatenate([jnp.ones((mask.shape[0], 1), bool), mask], 1)
    return Rollout(
        tokens=jnp.zeros(whole.shape, jnp.int32),
        mask=whole,
        action_mask=mask,
        finished=jnp.ones(mask.shape[0], bool) if finished is None else jnp.asarray(finished, bool),
        logprobs=jnp.zeros(mask.shape, jnp.float32) if logprobs is None else jnp.asarray(logprobs, jnp.float32),
        index=jnp.arange(mask.shape[0], dtype=jnp.int32),
    )


def experience(algorithm: Algorithm, scores: Any, mask: Any, *, finished: Any = None, kl_coef: float = 0.0, **scored: Any):
    """(Experience, metrics) of these scores; `scored` may hold logprobs, ref_logprobs, kl, greedy_score and kin."""
    made = rollout(mask, scored.get("logprobs"), finished)
    flags = ("greedy_finished", "greedy_mask")
    scored = {name: jnp.asarray(value, bool if name in flags else jnp.float32) for name, value in scored.items()}
    scored.setdefault("logprobs", made.logprobs)
    return jax.jit(algorithm.make_experience)(made, jnp.asarray(scores, jnp.float32), Scored(**scored), jnp.float32(kl_coef))


def update(algorithm: Algorithm, logprobs: Any, old: Experience, *, kl_coef: float = 0.0) -> tuple[RunState, Metrics]:
    """The algorithm's own update, with the log-probabilities themselves as parameters; the optimiser only keeps the gradient."""
    return jax.jit(_update, static_argnums=0)((algorithm,), jnp.asarray(logprobs, jnp.float32), old, kl_coef)[0]


def gradient(algorithm: Algorithm, logprobs: Any, old: Experience, *, kl_coef: float = 0.0) -> tuple[float, np.ndarray]:
    """Loss and d loss / d logprobs of one update."""
    return gradients({"": algorithm}, logprobs, old, kl_coef=kl_coef)[""]


def gradients(
    algorithms: dict[Any, Algorithm], logprobs: Any, old: Experience, *, kl_coef: float = 0.0
) -> dict[Any, tuple[float, np.ndarray]]:
    """The same of several algorithms, compiled as one program."""
    found = jax.jit(_update, static_argnums=0)(tuple(algorithms.values()), jnp.asarray(logprobs, jnp.float32), old, kl_coef)
    return {
        name: (float(metrics["policy/loss"]), np.asarray(state.actor.opt_state["logprobs"]))
        for name, (state, metrics) in zip(algorithms, found, strict=True)
    }


def _update(algorithms: tuple[Algorithm, ...], logprobs: jax.Array, old: Experience, kl_coef: Any):
    def policy_apply(params: Any, frozen: Frozen, batch: Experience) -> Scored:
        del frozen
        return Scored(logprobs=params["logprobs"][batch.tokens[:, 0]], entropy=jnp.zeros(batch.action_mask.shape))

    rows = jnp.arange(old.tokens.shape[0], dtype=jnp.int32)
    old = old.replace(tokens=old.tokens.at[:, 0].set(rows))  # the row's number, so that a part of the batch finds its parameters
    keeps = optax.GradientTransformation(lambda p: p, lambda grads, _, params: (jax.tree.map(jnp.zeros_like, params), grads))
    state = init_run_state(keeps, None, {"logprobs": logprobs}, None, kl_coef)
    updates = [algorithm.make_update(policy_apply, None, keeps, None) for algorithm in algorithms]
    return [update(state, old, jax.random.key(0), Frozen()) for update in updates]


def table_apply(params: Any, frozen: Any, batch: Sequences) -> jax.Array:
    """Log-probabilities f32[B, T] of a "model" whose parameters are its logits f32[B, T, V], row by row."""
    del frozen
    logprobs = ops.logits_logprobs(params["logits"][:, :-1], batch.tokens[:, 1:])
    return jnp.pad(logprobs, ((0, 0), (1, 0)))
