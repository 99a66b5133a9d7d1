"""Direct preference optimisation: the policy itself is the reward model.

The implicit reward of an answer is beta log(pi(y|x) / ref(y|x)). With delta the log-ratio of the chosen answer minus that of
the rejected one (summed over tokens), one pair costs

    dpo            -log sigmoid(beta delta)                                                       arXiv:2305.18290, eq. 7
    conservative   -(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta)                  Mitchell 2023, cDPO
    robust         (-(1 - e) log sigmoid(beta delta) + e log sigmoid(-beta delta)) / (1 - 2 e)    arXiv:2403.00409
    ipo_sum        (delta - 1 / (2 beta))^2                                                       arXiv:2310.12036, eq. 17
    ipo            ipo_sum with each log-ratio divided by its number of tokens, as its authors run it and TRL does

e is the probability that a label is wrong. `conservative` stops at a finite margin; `robust` has the expectation of the loss
without noise, and is not bounded below.
"""

import functools
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import config, ops
from rlhf_jax.algorithms.training import Offline, answer_logprobs, both_sides, require
from rlhf_jax.errors import UserError
from rlhf_jax.types import Frozen, Metrics, Params, Preferences, Sequences

Loss = Literal["dpo", "conservative", "robust", "ipo", "ipo_sum"]


def pair_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    beta: float,
    loss: Loss = "dpo",
    label_smoothing: float = 0.0,
    chosen_tokens: jax.Array | None = None,
    rejected_tokens: jax.Array | None = None,
) -> jax.Array:
    """Loss of each pair, f32[B]; the equations are at the top of this file.

    Args: chosen, rejected f32[B], log-ratio of policy and reference of each answer, nats, summed over tokens; tokens i32[B],
      length of each answer, read by "ipo"; beta: reward units per nat; label_smoothing: e in [0, 0.5).
    """
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    if loss == "ipo":
        chosen = chosen / jnp.maximum(require(chosen_tokens, "loss ipo: chosen_tokens"), 1)
        rejected = rejected / jnp.maximum(require(rejected_tokens, "loss ipo: rejected_tokens"), 1)
    delta = chosen - rejected
    if loss in ("ipo", "ipo_sum"):
        return (delta - 1.0 / (2.0 * beta)) ** 2
    right, wrong = jax.nn.softplus(-beta * delta), jax.nn.softplus(beta * delta)  # -log sigmoid(x) = softplus(-x), stable
    if loss == "dpo":
        return right
    if loss == "conservative":
        return (1.0 - label_smoothing) * right + label_smoothing * wrong
    if loss == "robust":
        return ((1.0 - label_smoothing) * right - label_smoothing * wrong) / (1.0 - 2.0 * label_smoothing)
    raise ValueError(f"dpo.loss {loss!r}: one of {', '.join(Loss.__args__)}")


def denominators(batch: Preferences) -> dict[str, jax.Array]:
    """Pairs of the global batch that have both answers, at least 1."""
    return {"pairs": jnp.maximum(jnp.sum(_usable(batch)), 1).astype(jnp.float32)}


def _usable(batch: Preferences) -> jax.Array:
    return jnp.any(batch.chosen.target_mask, 1) & jnp.any(batch.rejected.target_mask, 1)


def loss(
    settings: config.DPO,
    apply: Callable[[Params, Frozen, Sequences], jax.Array],
    params: Params,
    frozen: Frozen,
    batch: Preferences,
    counts: dict[str, jax.Array],
) -> tuple[jax.Array, Metrics]:
    """Mean pair loss of the global batch (this part's share). Both answers go through the model in one forward pass."""
    both = both_sides(batch)
    policy, reference = answer_logprobs(apply, params, frozen, both)
    chosen, rejected = jnp.split(policy - reference, 2)
    chosen_tokens, rejected_tokens = jnp.split(jnp.sum(both.target_mask, 1), 2)
    pairs = pair_loss(
        chosen,
        rejected,
        beta=settings.beta,
        loss=settings.loss,
        label_smoothing=settings.label_smoothing,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )
    usable = _usable(batch)

    def mean(x: jax.Array) -> jax.Array:
        return ops.masked_sum(x, usable) / counts["pairs"]

    value = mean(pairs)
    chosen_logprob, rejected_logprob = jnp.split(policy, 2)
    metrics = {
        "dpo/loss": value,
        "dpo/accuracy": mean(chosen > rejected),
        "dpo/margin": settings.beta * mean(chosen - rejected),
        "dpo/chosen_reward": settings.beta * mean(chosen),
        "dpo/rejected_reward": settings.beta * mean(rejected),
        "dpo/chosen_logprob_nats": mean(chosen_logprob),
        "dpo/rejected_logprob_nats": mean(rejected_logprob),
    }
    return value, metrics


def build(settings: config.DPO) -> Offline:
    """DPO with these settings; what is frozen is a `types.Frozen`."""
    if settings.loss not in Loss.__args__:
        raise UserError(f"dpo.loss {settings.loss!r}: one of {', '.join(Loss.__args__)}")
    if settings.beta <= 0:
        raise UserError(f"dpo.beta is {settings.beta:g}; it must be above 0, such as 0.1")
    if not 0 <= settings.label_smoothing < 0.5:
        raise UserError(f"dpo.label_smoothing is {settings.label_smoothing:g}; it must be at least 0 and below 0.5")
    if settings.label_smoothing and settings.loss not in ("conservative", "robust"):
        raise UserError(
            f"dpo.label_smoothing is {settings.label_smoothing:g} and dpo.loss {settings.loss} does not read it; "
            "remove it, or choose loss conservative or robust"
        )
    return Offline(loss=functools.partial(loss, settings), denominators=denominators)
