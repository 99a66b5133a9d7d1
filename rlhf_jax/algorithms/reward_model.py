"""Reward model from preferences: Bradley-Terry at the last token, or DeepSpeed-Chat's per-token form; calibration of scores."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import config, ops
from rlhf_jax.algorithms.training import Offline, both_sides
from rlhf_jax.errors import UserError
from rlhf_jax.types import Calibration, Metrics, Params, Preferences


def last_score(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Score at the last True position of each row (the end-of-sequence token where there is one); 0 for an empty row.

    Args: scores f32[B, T], reward units; mask bool[B, T]. Returns f32[B].
    """
    chex.assert_equal_shape([scores, mask])
    chex.assert_type(mask, bool)
    position = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    last = jnp.max(jnp.where(mask, position, -1), 1, keepdims=True)
    return jnp.sum(jnp.where(position == last, scores.astype(jnp.float32), 0.0), 1)


def bradley_terry(
    chosen: jax.Array,
    rejected: jax.Array,
    margin: jax.Array | None = None,
    *,
    centering_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d) + centering_coef (chosen + rejected)^2, d = chosen - rejected - margin.

    Args: chosen, rejected, margin f32[B], reward units; label_smoothing e, probability that a label is wrong. Returns f32[B].
    Sources: Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023, eq. 2; centring: Eisenstein et al. 2023, eq. 5.
    """
    chex.assert_equal_shape([chosen, rejected])
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    d = chosen - rejected if margin is None else chosen - rejected - margin.astype(jnp.float32)
    loss = (1.0 - label_smoothing) * jax.nn.softplus(-d) + label_smoothing * jax.nn.softplus(d)
    return loss + centering_coef * (chosen + rejected) ** 2 if centering_coef else loss


def per_token(
    chosen: jax.Array,
    rejected: jax.Array,
    chosen_tokens: jax.Array,
    rejected_tokens: jax.Array,
    chosen_length: jax.Array,
    rejected_length: jax.Array,
) -> jax.Array:
    """DeepSpeed-Chat: mean of -log sigmoid(chosen_t - rejected_t) over t in [first differing token, longer length).

    Quirks, reproduced: the *padding* positions of the shorter answer count, so scores there are trained; identical rows count
    their last position (loss log 2); position, not content, pairs the tokens. The corrected form is `bradley_terry`.
    (OPT's `num_padding_at_beginning` is a matter of the lengths given here.)

    A run scores padding as transformers does (`scoring.make_score_apply`). Other than in the original, its lengths are those of
    the masks, so an end-of-sequence token that is the padding token too still counts; and padding's embedding is always trained:
    torch's has no gradient where it belongs to the pad_token_id of config.json.

    Args: chosen, rejected f32[B, T], reward units; tokens i32[B, T]; lengths i32[B], index of the first padding. Returns f32[B].
    """
    chex.assert_equal_shape([chosen, rejected, chosen_tokens, rejected_tokens])
    position = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, 1)
    differs = chosen_tokens != rejected_tokens
    width = chosen.shape[1]
    first = jnp.where(jnp.any(differs, 1), jnp.argmax(differs, 1), width - 1)[:, None]
    end = jnp.where(jnp.any(differs, 1), jnp.maximum(chosen_length, rejected_length), width)[:, None]
    d = chosen.astype(jnp.float32) - rejected.astype(jnp.float32)
    inside = (position >= first) & (position < end)
    return ops.masked_mean(jax.nn.softplus(-jnp.where(inside, d, 0.0)), inside, 1)


def denominators(batch: Preferences) -> dict[str, jax.Array]:
    """Pairs of the global batch that have both answers, at least 1."""
    return {"pairs": jnp.maximum(jnp.sum(_usable(batch)), 1).astype(jnp.float32)}


def _usable(batch: Preferences) -> jax.Array:
    return jnp.any(batch.chosen.mask, 1) & jnp.any(batch.rejected.mask, 1)


def loss(
    settings: config.RewardModelLoss,
    apply: Callable[[Params, Any, Any], jax.Array],
    params: Params,
    frozen: Any,
    batch: Preferences,
    counts: dict[str, jax.Array],
) -> tuple[jax.Array, Metrics]:
    """Mean pair loss of the global batch (this part's share). Both answers go through the model in one forward pass.

    `apply(params, frozen, Sequences) -> f32[2B, T]`, a score for every token, and for DeepSpeed-Chat's form for padding too.
    """
    chosen_scores, rejected_scores = jnp.split(apply(params, frozen, both_sides(batch)).astype(jnp.float32), 2)
    chosen = last_score(chosen_scores, batch.chosen.mask)
    rejected = last_score(rejected_scores, batch.rejected.mask)
    if settings.loss == "bradley_terry":
        pairs = bradley_terry(
            chosen, rejected, batch.margin, centering_coef=settings.centering_coef, label_smoothing=settings.label_smoothing
        )
    else:
        lengths = (jnp.sum(batch.chosen.mask, 1), jnp.sum(batch.rejected.mask, 1))
        pairs = per_token(chosen_scores, rejected_scores, batch.chosen.tokens, batch.rejected.tokens, *lengths)
    usable = _usable(batch)

    def mean(x: jax.Array) -> jax.Array:
        return ops.masked_sum(x, usable) / counts["pairs"]

    value = mean(pairs)
    metrics = {
        "reward_model/loss": value,
        "reward_model/accuracy": mean(chosen > rejected),
        "reward_model/score_gap": mean(chosen - rejected),
        "reward_model/chosen_score": mean(chosen),
        "reward_model/rejected_score": mean(rejected),
    }
    return value, metrics


def build(settings: config.RewardModelLoss) -> Offline:
    """Reward modelling with these settings."""
    if settings.loss not in ("bradley_terry", "deepspeed_chat"):
        raise UserError(f"reward_model.loss {settings.loss!r}: one of bradley_terry, deepspeed_chat")
    if settings.loss == "deepspeed_chat" and (settings.centering_coef or settings.label_smoothing):
        raise UserError("reward_model.loss 'deepspeed_chat' has no centering_coef and no label_smoothing: remove them, or loss")
    return Offline(loss=functools.partial(loss, settings), denominators=denominators)


def accuracy(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """Share of pairs whose chosen answer has the higher score; a tie is not one. Args: f32[B]. Returns f32[]."""
    chex.assert_equal_shape([chosen, rejected])
    return jnp.mean((chosen > rejected).astype(jnp.float32))


def calibrate(scores: Any) -> Calibration:
    """Mean and deviation of the raw scores of fine-tuned samples: (raw - mean) / std has mean 0 and spread 1.

    Scores that are not finite are left out; without spread (or without scores) std is 1. Source: Stiennon et al. 2020, appendix.
    Args: scores f32[N], raw, reward units.
    """
    raw = np.asarray(scores, np.float64).ravel()
    raw = raw[np.isfinite(raw)]
    if raw.size == 0:
        return Calibration()
    std = float(raw.std())
    return Calibration(mean=float(raw.mean()), std=std if std > 1e-6 * max(1.0, float(np.abs(raw).max())) else 1.0)


class Bins(NamedTuple):
    """Predicted and observed agreement with the labels, by confidence."""

    confidence: jax.Array  # f32[bins], mean of sigmoid(|d|); 0 in an empty bin
    accuracy: jax.Array  # f32[bins], share of pairs where d > 0
    count: jax.Array  # i32[bins]
    error: jax.Array  # f32[], expected calibration error: mean |confidence - accuracy| over pairs


def calibration_bins(chosen: jax.Array, rejected: jax.Array, *, bins: int = 10) -> Bins:
    """Reliability of the preference probability sigmoid(d), d = chosen - rejected, in equal bins of confidence in [0.5, 1].

    Args: chosen, rejected f32[B]. Source: Guo et al. 2017, eq. 5.
    """
    chex.assert_equal_shape([chosen, rejected])
    d = chosen.astype(jnp.float32) - rejected.astype(jnp.float32)
    confidence = jax.nn.sigmoid(jnp.abs(d))
    index = jnp.clip(((confidence - 0.5) * 2 * bins).astype(jnp.int32), 0, bins - 1)
    member = jax.nn.one_hot(index, bins)
    count = jnp.sum(member, 0)
    mean_confidence = confidence @ member / jnp.maximum(count, 1)
    mean_accuracy = (d > 0).astype(jnp.float32) @ member / jnp.maximum(count, 1)
    error = jnp.sum(count * jnp.abs(mean_confidence - mean_accuracy)) / jnp.maximum(jnp.sum(count), 1)
    return Bins(mean_confidence, mean_accuracy, count.astype(jnp.int32), error)
