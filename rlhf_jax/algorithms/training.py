"""What every algorithm shares: records, optimiser, micro-batches, the guarded step, the offline update (online: `update.py`).

Losses are *shares*: each already divided by a denominator counted over the whole (global) minibatch, so that micro-batches
and devices add up to the same gradient however the batch is split.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import config, ops, packed
from rlhf_jax.errors import UserError
from rlhf_jax.types import Experience, Frozen, Metrics, Params, Preferences, RunState, Sequences, TrainState, join

Loss = Callable[..., tuple[jax.Array, Metrics]]
T = TypeVar("T")
DECAYED = ("kernel", "embedding", "lora_a", "lora_b")  # names of matrices; norms, biases and scalars are not decayed


class Algorithm(NamedTuple):
    """An online algorithm. The loop does not know which one runs."""

    make_experience: Callable[..., tuple[Experience, Metrics]]  # (rollout, scores f32[B], scored, kl_coef)
    make_update: Callable[..., Callable[..., tuple[RunState, Metrics]]]  # (policy_apply, value_apply, actor_tx, critic_tx)
    needs: frozenset[str]  # of critic, reference, kl, entropy, greedy: what Scored must hold
    group_size: int = 1  # answers per prompt
    kl_coef: float = 0.0  # reward units per nat, the coefficient that a run begins with


class Offline(NamedTuple):
    """An algorithm that learns from a fixed data set."""

    loss: Loss  # (apply, params, frozen, batch, denominators) -> share of the global mean, metric shares
    denominators: Callable[[Any], dict[str, jax.Array]]  # global batch -> counts
    prepare: Callable[..., Any] = lambda apply, params, frozen, batch, micro_batches: batch  # global batch, before it is split
    # global batch -> how many rows a metric is the mean of, for metrics where that is not the first denominator
    weights: Callable[[Any], Metrics] = lambda batch: {}


def learning_rate(settings: config.Optimizer, total_steps: int) -> optax.Schedule:
    """Schedule: step (from 0) -> learning rate. Linear warm-up that is never 0, then constant, linear or cosine decay.

    lr(t) = peak min(1, (t + 1) / warmup) (f + (1 - f) shape(progress)), progress from the end of warm-up to total_steps.
    """
    if settings.schedule not in ("constant", "linear", "cosine"):
        raise UserError(f"optimizer.schedule {settings.schedule!r}: one of constant, linear, cosine")

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (step + 1) / max(settings.warmup_steps, 1))
        progress = jnp.clip((step - settings.warmup_steps) / max(total_steps - settings.warmup_steps, 1), 0.0, 1.0)
        if settings.schedule == "constant":
            return settings.learning_rate * warm
        shape = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return settings.learning_rate * warm * (settings.final_fraction + (1.0 - settings.final_fraction) * shape)

    return schedule


def _decayed(params: Params) -> Any:
    def is_matrix(path: tuple[Any, ...], _: jax.Array) -> bool:
        return getattr(path[-1], "key", getattr(path[-1], "name", None)) in DECAYED

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(settings: config.Optimizer, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping the global norm; decay on matrices only, those of an adapter too.

    `total_steps` counts optimiser steps: iterations x epochs x minibatches. clip_norm <= 0 turns clipping off. Moments and
    updates are float32, whatever the parameters are.
    """
    adamw = optax.adamw(
        learning_rate(settings, total_steps),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=_decayed,
    )
    clipped = optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw) if settings.clip_norm > 0 else adamw

    def update(updates: Params, state: Any, params: Params | None = None) -> Any:
        return clipped.update(_float32(updates), state, _float32(params))

    return optax.GradientTransformation(lambda params: clipped.init(_float32(params)), update)


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def add_updates(params: Params, updates: Params, step: jax.Array) -> Params:
    """params + updates. A bfloat16 parameter is rounded up or down at random, so that its mean moves by the whole update.

    Rounded to nearest it would not move at all where the update is below 1/512 of it, which updates of fine-tuning are
    (stochastic rounding: Zamirai et al. 2020, arXiv:2010.06192). `step` i32[] seeds the draw.
    """
    key = jax.random.fold_in(jax.random.key(0), step)

    def add(number: int, old: jax.Array, change: jax.Array) -> jax.Array:
        total = old.astype(jnp.float32) + change
        if old.dtype != jnp.bfloat16:
            return total.astype(old.dtype)
        bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
        noise = jax.random.bits(jax.random.fold_in(key, number), old.shape, jnp.uint32) >> 16
        kept = (bits + noise) & jnp.uint32(0xFFFF0000)
        return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)

    leaves, tree = jax.tree.flatten(params)
    new = [add(number, old, change) for number, (old, change) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))]
    return jax.tree.unflatten(tree, new)


def require(value: T | None, what: str) -> T:
    """The value, or one message about what is absent."""
    if value is None:
        raise ValueError(f"{what} is absent but this algorithm needs it: see `Algorithm.needs` and the settings")
    return value


def share(sums: Metrics, count: jax.Array) -> Metrics:
    """Divide metric sums by the global count; maxima ("_max") and metrics with axes stay as they are."""
    return {key: value if key.endswith("_max") or value.ndim else value / count for key, value in sums.items()}


def both_sides(batch: Preferences) -> Sequences:
    """The chosen answers of a batch, then the rejected ones, as 2B rows: one forward pass for both."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.chosen, batch.rejected)


def answer_logprobs(
    apply: Callable[[Params, Frozen, Sequences], jax.Array], params: Params, frozen: Frozen, sequences: Sequences
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each answer under the policy, and under the reference, f32[B], nats, summed over target tokens.

    `apply(params, frozen, Sequences) -> f32[B, T]`, entry t the log-probability of token t. The reference is `frozen.reference`
    (on `frozen.actor`, where it is an adapter), or the base under the adapter, `frozen.actor`; it has no gradient.
    """
    reference = frozen.actor if frozen.reference is None else join(frozen.actor, frozen.reference)
    policy = ops.masked_sum(apply(params, frozen, sequences), sequences.target_mask, 1)
    fixed = ops.masked_sum(apply(require(reference, "Frozen.reference"), Frozen(), sequences), sequences.target_mask, 1)
    return policy, jax.lax.stop_gradient(fixed)


def split_rows(batch: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B // parts, ...], interleaved: a batch that is sharded over devices stays so in every part."""

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise UserError(f"batch of {x.shape[0]} rows cannot be split into {parts} equal parts; change micro_batches")
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def join_rows(parts: Any) -> Any:
    """[parts, B // parts, ...] -> [B, ...]: back in the order that `split_rows` found."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def accumulate(
    loss_fn: Loss, params: Params, batch: Any, micro_batches: int, layout: packed.Layout | None = None
) -> tuple[jax.Array, Metrics, Params]:
    """Sum of losses, metrics and gradients over the micro-batches of a batch, or over its packed parts: the same for every split.

    `loss_fn(params, part) -> (share, metrics)` must divide by denominators of the whole batch. Scalar metrics are summed
    ("_max": the maximum is taken); metrics with a leading row axis come back in the order of the batch.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if micro_batches == 1 and layout is None:
        (loss, metrics), grads = gradient(params, batch)
        return loss, metrics, grads

    def add(total: tuple[jax.Array, Metrics, Params], part: Any) -> tuple[tuple[jax.Array, Metrics, Params], Metrics]:
        (loss, metrics), grads = gradient(params, part)
        scalars = {
            key: jnp.maximum(old, metrics[key]) if key.endswith("_max") else old + metrics[key] for key, old in total[1].items()
        }
        rows = {key: value for key, value in metrics.items() if value.ndim}
        return (total[0] + loss, scalars, jax.tree.map(lambda a, g: a + g.astype(a.dtype), total[2], grads)), rows

    parts = split_rows(batch, micro_batches) if layout is None else None
    first = jax.tree.map(lambda x: x[0], parts) if layout is None else packed.part(batch, layout, jnp.int32(0))
    shapes = jax.eval_shape(loss_fn, params, first)[1]
    scalars = {k: jnp.full((), -jnp.inf if k.endswith("_max") else 0.0, jnp.float32) for k, v in shapes.items() if not v.shape}
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    start = (jnp.zeros(()), scalars, zeros)
    if layout is None:
        (loss, metrics, grads), rows = jax.lax.scan(add, start, parts)
        rows = join_rows(rows)
    else:

        def more(number: jax.Array, carry: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
            total, found = add(carry[0], packed.part(batch, layout, number))
            return total, jax.tree.map(jnp.add, carry[1], found)

        nothing = {key: jnp.zeros(value.shape, value.dtype) for key, value in shapes.items() if value.shape}
        (loss, metrics, grads), rows = jax.lax.fori_loop(0, layout.parts, more, (start, nothing))
    return loss, metrics | rows, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def apply_gradients(
    tx: optax.GradientTransformation, state: TrainState, grads: Params, finite: jax.Array, *, wanted: jax.Array | bool = True
) -> tuple[TrainState, Metrics]:
    """One optimiser step, taken only if `finite` (the loss is) and the gradient's norm is: otherwise nothing changes at all.

    `wanted` False leaves the state alone as well, without counting as skipped. Decided inside jit.
    Metrics: update/grad_norm (before clipping), update/skipped (0 or 1).
    """
    norm = optax.tree.norm(_float32(grads))
    finite = jnp.logical_and(finite, jnp.isfinite(norm))
    lay = state.opt_state
    opt_state, grads = _fetched(lay, grads)
    state = state.replace(opt_state=opt_state)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    stepped = TrainState(step=state.step + 1, params=add_updates(state.params, updates, state.step), opt_state=opt_state)
    taken = jnp.logical_and(finite, wanted)
    state = jax.tree.map(lambda old, new: jnp.where(taken, new, old), state, stepped)
    return state.replace(opt_state=_returned(state.opt_state, lay)), {
        "update/grad_norm": norm,
        "update/skipped": 1.0 - finite.astype(jnp.float32),
    }


def _fetched(opt_state: Any, grads: Params) -> tuple[Any, Params]:
    """Bring an optimiser state that waits in the host's memory (model.offload) to the device, once the gradients are there.

    So the device holds the moments of one model during its step, not those of all during the whole program.
    """
    waits = jax.tree.map(lambda x: jax.typeof(x).memory_space == jax.memory.Space.Host, opt_state)
    if not any(jax.tree.leaves(waits)):
        return opt_state, grads
    opt_state, grads = jax.lax.optimization_barrier((opt_state, grads))
    return jax.tree.map(lambda x, w: jax.device_put(x, jax.memory.Space.Device) if w else x, opt_state, waits), grads


def _returned(opt_state: Any, lay: Any) -> Any:
    """The optimiser state back where it lay."""

    def put(new: jax.Array, old: jax.Array) -> jax.Array:
        space = jax.typeof(old).memory_space
        return new if jax.typeof(new).memory_space == space else jax.device_put(new, space)

    return jax.tree.map(put, opt_state, lay)


def make_offline_update(
    loss: Loss,
    denominators: Callable[[Any], dict[str, jax.Array]],
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
    *,
    prepare: Callable[[Params, Any, Any, int], Any] = lambda params, frozen, batch, micro_batches: batch,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
    """(state, batch, frozen) -> (state, metrics): one guarded optimiser step on a batch.

    `loss(params, frozen, batch, denominators)`: an `Offline.loss` with its `apply` bound (functools.partial), and so is
    `prepare(params, frozen, batch, micro_batches)`.
    """

    def update(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        batch = prepare(state.params, frozen, batch, micro_batches)
        counts = denominators(batch)
        value, metrics, grads = accumulate(lambda p, part: loss(p, frozen, part, counts), state.params, batch, micro_batches)
        state, step = apply_gradients(tx, state, grads, jnp.isfinite(value))
        return state, metrics | step

    return update
