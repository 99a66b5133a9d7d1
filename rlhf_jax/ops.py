"""Arithmetic on masked token arrays: means, whitening, log-probabilities, entropy, KL estimators, loss aggregation.

Everything here is computed in float32 whatever the inputs' dtype, and the mask is applied before the non-linearity, so that
whatever stands in padding (NaN included) reaches neither a value nor a gradient.
"""

from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Estimator = Literal["k1", "k2", "k3", "k1_plus", "k3_plus"]
Variance = Literal["unbiased", "population"]
Aggregation = Literal["token_mean", "sequence_mean_token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"]

LOG_RATIO_CAP = 80.0  # exp(80) = 5.5e34 is still finite in float32; beyond, a ratio is a constant with gradient 0
ZERO_PROBABILITY = -1e4  # log-probability that counts for an impossible token of the reference, nats: a KL stays finite
CHUNK = 128  # positions whose logits exist at one time, where nothing else is asked for
NORMALIZER = "normalizer"  # of a softmax over the vocabulary: the only thing that a chunk keeps for its backward pass
WHITEN_EPS = 1e-8  # added to the variance, as every peer does


def masked_sum(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Sum of x where mask is True, in float32."""
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0), axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of x where mask is True, in float32; 0 where the mask keeps nothing."""
    return masked_sum(x, mask, axis) / jnp.maximum(jnp.sum(mask, axis), 1)


def _centred(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x - mean (0 where masked), mean and token count. The second pass makes a constant exactly its own mean."""
    mean = masked_mean(x, mask)
    mean = mean + masked_mean(jnp.where(mask, x, mean) - mean, mask)
    return jnp.where(mask, x - mean, 0.0), mean, jnp.sum(mask)


def masked_var(x: jax.Array, mask: jax.Array, *, variance: Variance = "unbiased") -> jax.Array:
    """Variance of x where mask is True: sum (x - mean)^2 / (n - 1), or / n for "population"; 0 for fewer than 2 tokens."""
    chex.assert_equal_shape([x, mask])
    centred, _, count = _centred(x.astype(jnp.float32), mask)
    return jnp.sum(centred**2) / jnp.maximum(count - (variance == "unbiased"), 1)


def whiten(x: jax.Array, mask: jax.Array, *, variance: Variance = "unbiased", shift_mean: bool = True) -> jax.Array:
    """Scale x to mean 0 and variance 1 over the True positions of the whole array.

    y = (x - mean) / sqrt(var + 1e-8), plus the mean again without `shift_mean`. Equal values become 0 (the mean); with fewer
    than two tokens there is no deviation to divide by and x stays as it is. Masked positions are 0.

    Args: x f[...]; mask bool[...]; variance divides by n - 1 or by n.
    """
    chex.assert_equal_shape([x, mask])
    x = x.astype(jnp.float32)
    centred, mean, count = _centred(x, mask)
    var = jnp.sum(centred**2) / jnp.maximum(count - (variance == "unbiased"), 1)
    scaled = centred * jax.lax.rsqrt(var + WHITEN_EPS) + (0.0 if shift_mean else mean)
    return jnp.where(mask, jnp.where(count < 2, x, scaled), 0.0)


def masked_quantile(x: jax.Array, mask: jax.Array, q: float) -> jax.Array:
    """The smallest kept value that at least a share q of the kept values does not exceed; 0 where nothing is kept."""
    chex.assert_equal_shape([x, mask])
    ordered = jnp.sort(jnp.where(mask, x.astype(jnp.float32), jnp.inf).ravel())
    count = jnp.sum(mask)
    rank = jnp.clip(jnp.ceil(q * count).astype(jnp.int32) - 1, 0, x.size - 1)
    return jnp.where(count > 0, ordered[rank], 0.0)


def _exp_minus_1_minus(d: jax.Array) -> jax.Array:
    """exp(d) - 1 - d without cancellation: its series for small d, expm1 otherwise; d is capped so that it stays finite."""
    d = jnp.minimum(d, LOG_RATIO_CAP)
    small = jnp.abs(d) < 0.25
    s = jnp.where(small, d, 0.0)
    series = 1.0
    for k in range(8, 2, -1):  # d^2/2 (1 + d/3 (1 + d/4 (...))): the first term left out is 3e-10 of the sum at 0.25
        series = 1.0 + s / k * series
    return jnp.where(small, 0.5 * s * s * series, jnp.expm1(jnp.where(small, 1.0, d)) - d)


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, kind: Estimator) -> jax.Array:
    """Estimate of KL(policy || reference) from the log-probabilities of tokens that the policy sampled.

    With d = logprobs - ref_logprobs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. "k1_plus" and "k3_plus" have the value of k1
    and k3 with the gradient of k2, whose expectation is the gradient of the KL (that of k1 itself has expectation 0).
    Exponents are capped at 80, never the estimate.

    Args: logprobs, ref_logprobs f[...], nats. Source: Schulman 2020, "Approximating KL divergence"; Liu et al. 2025.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    d = logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d**2
    if kind == "k3":
        return _exp_minus_1_minus(-d)
    if kind in ("k1_plus", "k3_plus"):
        k2 = 0.5 * d**2
        value = d if kind == "k1_plus" else _exp_minus_1_minus(-d)
        return k2 - jax.lax.stop_gradient(k2) + jax.lax.stop_gradient(value)
    raise ValueError(f"kl estimator {kind!r}: one of k1, k2, k3, k1_plus, k3_plus (exact KL: ops.exact_kl, ops.token_kl)")


def log_softmax(logits: jax.Array) -> jax.Array:
    """Log-probabilities over the last axis in float32, the maximum subtracted first.

    Logits of -inf are impossible tokens (log-probability -inf, gradient 0), also when a whole row is.
    """
    logits = logits.astype(jnp.float32)
    top, log_total = _normalizer(logits)
    return logits - top - log_total


def _normalizer(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What log_softmax subtracts from f32[..., V], in this order: the maximum and log sum exp(logits - maximum), f32[..., 1]."""
    top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    total = jnp.sum(jnp.exp(logits - top), -1, keepdims=True)
    return top, jnp.log(jnp.where(total == 0, 1.0, total))


@jax.custom_vjp
def _target_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`logits_logprobs` of float32. Where a backward pass computes the logits again, it does not normalise them again."""
    return _pick(log_softmax(logits), targets)


def _target_logprobs_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    top, log_total = (checkpoint_name(x, NORMALIZER) for x in _normalizer(logits))
    return _pick(logits - top - log_total, targets), (logits, targets, top, log_total)


def _target_logprobs_backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, top, log_total = saved
    return gradient[..., None] * (_is_target(logits.shape, targets) - jnp.exp(logits - top - log_total)), None


_target_logprobs.defvjp(_target_logprobs_forward, _target_logprobs_backward)


def _pick(table: jax.Array, targets: jax.Array) -> jax.Array:
    """table[..., targets] as a masked sum: over a vocabulary split among devices a gather would fetch the whole table."""
    return jnp.sum(jnp.where(_is_target(table.shape, targets), table, 0.0), -1)


def _is_target(shape: tuple[int, ...], targets: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets.dtype, shape, len(shape) - 1) == targets[..., None]


def logits_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log softmax(logits)[targets], nats. No shift: `logits[..., j, :]` must be those that predict `targets[..., j]`.

    Args: logits f[..., V]; targets i[...]. Returns f32[...].
    """
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    return _pick(log_softmax(logits), targets)


def _entropy(logprobs: jax.Array) -> jax.Array:
    possible = ~jnp.isneginf(logprobs)
    finite = jnp.where(possible, logprobs, 0.0)
    return -jnp.sum(jnp.where(possible, jnp.exp(finite) * finite, 0.0), -1)


def logits_entropy(logits: jax.Array) -> jax.Array:
    """Entropy of softmax(logits), - sum p log p in nats with 0 log 0 = 0, over the last axis: f[..., V] -> f32[...]."""
    return _entropy(log_softmax(logits))


def exact_kl(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(ref_logits)) = sum p (log p - log q) in nats, summed over the whole vocabulary.

    A token impossible under both counts 0; one impossible under the reference alone counts as log q = -1e4, not infinity.

    Args: logits, ref_logits f[..., V]. Returns f32[...].
    """
    chex.assert_equal_shape([logits, ref_logits])
    p, q = log_softmax(logits), log_softmax(ref_logits)
    possible = ~jnp.isneginf(p)
    finite = jnp.where(possible, p, 0.0)
    q = jnp.where(jnp.isneginf(q), ZERO_PROBABILITY, q)
    return jnp.sum(jnp.where(possible, jnp.exp(finite) * (finite - q), 0.0), -1)


def response_hidden(hidden: jax.Array, response_length: int) -> jax.Array:
    """States before each response token: hidden[:, L-R-1 : L-1]. The one place where states and targets are shifted.

    Args: hidden f[B, L, D] of a left-padded prompt and R response tokens. Returns f[B, R, D].
    """
    chex.assert_rank(hidden, 3)
    length = hidden.shape[1]
    if not 0 < response_length < length:
        raise ValueError(f"response length {response_length}: must be in 1..{length - 1}, below the {length} states given")
    return hidden[:, length - response_length - 1 : length - 1]


def pack_kept(kept: jax.Array) -> jax.Array:
    """Bit set of the tokens that sampling kept: bool[..., V] -> u32[..., ceil(V/32)], token v in bit v % 32 of word v // 32."""
    chex.assert_type(kept, bool)
    vocab = kept.shape[-1]
    words = -(-vocab // 32)
    bits = jnp.pad(kept, [(0, 0)] * (kept.ndim - 1) + [(0, words * 32 - vocab)]).reshape(*kept.shape[:-1], words, 32)
    place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1)
    return jnp.sum(bits.astype(jnp.uint32) << place, -1, dtype=jnp.uint32)


def unpack_kept(words: jax.Array, vocab_size: int) -> jax.Array:
    """Inverse of `pack_kept`: u32[..., ceil(V/32)] -> bool[..., V]."""
    chex.assert_type(words, jnp.uint32)
    place = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
    bits = (words[..., None] >> place) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :vocab_size].astype(bool)


def sampled_logits(
    logits: jax.Array, *, temperature: float | jax.Array = 1.0, kept: jax.Array | None = None, targets: jax.Array | None = None
) -> jax.Array:
    """Logits of the distribution that was sampled: divided by the temperature, -inf outside the kept set.

    An empty kept set (padding) keeps everything; the target itself is always kept, so its log-probability is finite.

    Args: logits f[..., V]; kept u32[..., ceil(V/32)] or None for all; targets i[...]. Returns f32[..., V].
    """
    logits = logits.astype(jnp.float32) / _positive(temperature)
    if kept is None:
        return logits
    keep = unpack_kept(kept, logits.shape[-1])
    keep |= ~jnp.any(keep, -1, keepdims=True)
    if targets is not None:
        keep |= _is_target(logits.shape, targets)
    return jnp.where(keep, logits, -jnp.inf)


def _positive(temperature: float | jax.Array) -> float | jax.Array:
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature {temperature}: log-probabilities need one above 0; score greedy answers at temperature 1")
    return temperature


def _over_chunks(
    function: Callable[..., Any], chunk: int | None, arrays: tuple[Any, ...], wanted: jax.Array | None = None
) -> Any:
    """Apply `function` to slices of axis 1, recomputed in the backward pass: at most `chunk` positions exist at one time.

    With `wanted` bool[B, R] the results, f[B, R] then, of slices where it is nowhere True are 0 and cost nothing.
    """
    batch, length = arrays[0].shape[:2]
    chunk = CHUNK if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk {chunk}: at least 1 token")
    size = min(chunk, length)
    count = -(-length // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def join(y: jax.Array) -> jax.Array:
        return jnp.moveaxis(y, 0, 1).reshape(batch, count * size, *y.shape[3:])[:, :length]

    policy = jax.checkpoint_policies.save_only_these_names(NORMALIZER)

    def apply(slices: tuple[Any, ...], wanted: jax.Array | None) -> Any:
        if wanted is None:
            return function(*slices)
        nothing = jax.tree.map(lambda x: jnp.zeros_like(wanted, x.dtype), jax.eval_shape(function, *slices))
        return jax.lax.cond(jnp.any(wanted), lambda: function(*slices), lambda: nothing)

    body = jax.checkpoint(apply, policy=policy, prevent_cse=False)
    slices = jax.tree.map(split, (arrays, wanted if count > 1 else None))
    _, out = jax.lax.scan(lambda carry, slices: (carry, body(*slices)), None, slices)
    return jax.tree.map(join, out)


def _blank(hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
    return hidden if mask is None else jnp.where(mask[..., None], hidden, jnp.zeros((), hidden.dtype))


def token_logprobs(
    hidden: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    chunk: int | None = None,
    kept: jax.Array | None = None,
    mask: jax.Array | None = None,
    entropy: bool = False,
    wanted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability of each target, from hidden states, `chunk` positions at a time: [B, R, V] never exists.

    logprobs[b, j] = log softmax(unembed(hidden[b, j]) / temperature restricted to kept[b, j])[targets[b, j]].
    hidden[:, j] is the state *before* target j (see `response_hidden`).

    Args: hidden f[B, R, D]; unembed f[..., D] -> f[..., V]; targets i32[B, R]; kept u32[B, R, ceil(V/32)]; mask bool[B, R], where
      given, blanks states that do not count (results there are 0); `wanted` bool[B, R] leaves out the chunks where it is nowhere
      True: one device decides. Returns f32[B, R] and entropy f32[B, R] or None, nats.
    """
    chex.assert_rank([hidden, targets], [3, 2])
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    _positive(temperature)

    def head(hidden: jax.Array, targets: jax.Array, kept: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        logits = sampled_logits(unembed(hidden), temperature=temperature, kept=kept, targets=targets)
        return _target_logprobs(logits, targets), logits_entropy(logits) if entropy else None

    out = _over_chunks(head, chunk, (_blank(hidden, mask), targets, kept), wanted)
    return out if mask is None else jax.tree.map(lambda x: jnp.where(mask, x, 0.0), out)


def token_logprobs_and_correct(
    hidden: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    targets: jax.Array,
    *,
    chunk: int | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs`, and whether no token was likelier than the target, from the same logits: f32[B, R] and bool[B, R].

    Args: hidden f[B, R, D]; unembed f[..., D] -> f[..., V]; targets i32[B, R]; mask bool[B, R], outside it 0 and False.
    """
    chex.assert_rank([hidden, targets], [3, 2])

    def head(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = unembed(hidden).astype(jnp.float32)
        fixed = jax.lax.stop_gradient(logits)
        return _target_logprobs(logits, targets), _pick(fixed, targets) >= jnp.max(fixed, -1)

    logprobs, correct = _over_chunks(head, chunk, (_blank(hidden, mask), targets))
    return (logprobs, correct) if mask is None else (jnp.where(mask, logprobs, 0.0), correct & mask)


def token_kl(
    hidden: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    ref_hidden: jax.Array,
    ref_unembed: Callable[[jax.Array], jax.Array],
    *,
    temperature: float | jax.Array = 1.0,
    chunk: int | None = None,
    kept: jax.Array | None = None,
    mask: jax.Array | None = None,
    wanted: jax.Array | None = None,
) -> jax.Array:
    """Exact KL(policy || reference) at each position in nats, from hidden states, `chunk` positions at a time.

    Both distributions have the same temperature and the same kept tokens.

    Args: hidden f[B, R, D], ref_hidden f[B, R, D']; kept u32[B, R, ceil(V/32)]; mask, wanted bool[B, R] as in `token_logprobs`.
      Returns f32[B, R].
    """
    chex.assert_rank([hidden, ref_hidden], [3, 3])
    chex.assert_equal_shape_prefix([hidden, ref_hidden], 2)
    _positive(temperature)

    def head(hidden: jax.Array, ref_hidden: jax.Array, kept: jax.Array | None) -> jax.Array:
        logits = sampled_logits(unembed(hidden), temperature=temperature, kept=kept)
        return exact_kl(logits, sampled_logits(ref_unembed(ref_hidden), temperature=temperature, kept=kept))

    out = _over_chunks(head, chunk, (_blank(hidden, mask), _blank(ref_hidden, mask), kept), wanted)
    return out if mask is None else jnp.where(mask, out, 0.0)


def aggregation_denominator(mask: jax.Array, kind: Aggregation) -> jax.Array:
    """What `aggregate` divides by, to be counted over the *global* batch before it is split into micro-batches.

    token_mean: tokens. sequence_mean_*: sequences that have a token. sequence_mean_token_sum_norm: B x R, a constant.

    Args: mask bool[B, R]. Returns f32[], at least 1.
    """
    chex.assert_rank(mask, 2)
    if kind == "token_mean":
        count = jnp.sum(mask)
    elif kind in ("sequence_mean_token_sum", "sequence_mean_token_mean"):
        count = jnp.sum(jnp.any(mask, 1))
    elif kind == "sequence_mean_token_sum_norm":
        count = jnp.asarray(mask.size)
    else:
        raise ValueError(f"aggregation {kind!r}: one of {', '.join(Aggregation.__args__)}")
    return jnp.maximum(count, 1).astype(jnp.float32)


def aggregate(loss: jax.Array, mask: jax.Array, kind: Aggregation, *, denominator: jax.Array | None = None) -> jax.Array:
    """One number from token losses; sequences without a token contribute nothing.

    token_mean                    sum of all tokens / tokens                                  (DAPO)
    sequence_mean_token_sum       mean over sequences of their sums
    sequence_mean_token_mean      mean over sequences of their means                          (GRPO)
    sequence_mean_token_sum_norm  mean over all B rows of their sums divided by R             (Dr.GRPO)

    Args: loss f[B, R]; mask bool[B, R]; denominator f32[] of the global batch (`aggregation_denominator`), default this batch's.
    """
    chex.assert_rank([loss, mask], 2)
    chex.assert_equal_shape([loss, mask])
    if denominator is None:
        denominator = aggregation_denominator(mask, kind)
    rows = masked_mean(loss, mask, 1) if kind == "sequence_mean_token_mean" else masked_sum(loss, mask, 1)
    return jnp.sum(rows) / denominator
