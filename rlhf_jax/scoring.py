"""What the models say about sequences: log-probabilities of actor and reference, values, scores.

Every `make_*` closes over a `types.Model` and gives a pure function of parameters and arrays. Heads are applied to response
positions only, log-probabilities in chunks: [B, L, V] never exists. Parameters arrive in two trees, what is trained and what is
frozen, and are merged by `types.join` (a LoRA adapter with its base; the whole model with nothing).

Policy, old policy and reference are all scored at the temperature of the sampler, and where it filtered tokens, on the tokens
that it kept: ratio and KL are those of the distribution that was sampled.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax import config, ops
from rlhf_jax.errors import UserError
from rlhf_jax.types import Calibration, Experience, Frozen, Model, Params, Rollout, Scored, Sequences, join

Batch = Experience | Rollout
PolicyApply = Callable[[Params, Frozen, Batch], Scored]
ValueApply = Callable[[Params, Frozen, Batch], jax.Array]


def make_policy_apply(
    model: Model,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy: bool = False,
    kl_model: Model | None = None,
) -> PolicyApply:
    """(actor's trained params, frozen, batch) -> Scored with `logprobs`, and `entropy`, `kl` where asked for.

    logprobs[b, j] = log softmax(logits before token j / temperature, on the kept tokens)[token j], nats, 0 where masked.
    With `kl_model` also the exact KL(actor || reference) of every position, whose gradient reaches the actor alone.
    Raises UserError for a temperature of 0: greedy answers have no log-probability.
    """
    check_temperature(temperature)

    def apply(params: Params, frozen: Frozen, batch: Batch) -> Scored:
        actor = join(frozen.actor, params)
        states, (targets, rows) = acting_states(model, actor, batch), acted(batch)

        def score(head: Params, states: jax.Array, targets: jax.Array, rows: dict[str, Any]) -> Any:
            unembed, options = functools.partial(model.logits, head), {"temperature": temperature, "chunk": chunk}
            return ops.token_logprobs(states, unembed, targets, entropy=entropy, **options, **rows)

        logprobs, entropies = model.by_rows(score, (actor,), states, targets, rows)
        kl = None
        if kl_model is not None:
            kl = reference_kl(model, actor, states, kl_model, frozen, batch, temperature=temperature, chunk=chunk)
        found = {"logprobs": logprobs, "entropy": entropies, "kl": kl}
        return Scored(**jax.tree.map(functools.partial(by_response, batch), found))

    return apply


def make_value_apply(model: Model) -> ValueApply:
    """(critic's trained params, frozen, batch) -> f32[B, R], reward units: value of the state before token j, 0 where masked."""

    def apply(params: Params, frozen: Frozen, batch: Batch) -> jax.Array:
        critic = join(frozen.critic, params)
        values = model.score(critic, acting_states(model, critic, batch))
        return jnp.where(batch.action_mask, by_response(batch, values), 0.0)

    return apply


def make_scorer(
    actor: Model,
    critic: Model | None = None,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    needs: Collection[str] = ("critic", "reference"),
    old_logprobs: Literal["rollout", "recompute"] = "recompute",
) -> Callable[[Params, Params | None, Frozen, Rollout], Scored]:
    """(actor's params, critic's params, frozen, rollout) -> Scored, one program for everything that an algorithm needs.

    `needs` names what is wanted beside the actor's log-probabilities: "critic" (values and bootstrap), "reference", "kl" (exact),
    "entropy"; other names are the loop's business.
    `old_logprobs` "rollout" trusts those collected while sampling and saves the actor's forward pass.
    The reference has the actor's architecture: see `reference_params`.
    """
    check_temperature(temperature)
    if "critic" in needs and critic is None:
        raise UserError("the algorithm needs a critic and there is none; give make_scorer the critic's model")
    policy = make_policy_apply(
        actor, temperature=temperature, chunk=chunk, entropy="entropy" in needs, kl_model=actor if "kl" in needs else None
    )
    reuse = old_logprobs == "rollout" and not {"kl", "entropy"} & set(needs)

    def score(actor_params: Params, critic_params: Params | None, frozen: Frozen, rollout: Rollout) -> Scored:
        with jax.named_scope("actor"):
            scored = Scored(logprobs=rollout.logprobs) if reuse else policy(actor_params, frozen, rollout)
        if old_logprobs == "rollout":
            scored = scored.replace(logprobs=jnp.where(rollout.action_mask, rollout.logprobs, 0.0))
        if "reference" in needs:
            reference = Frozen(actor=reference_params(frozen))
            with jax.named_scope("reference"):
                ref = make_policy_apply(actor, temperature=temperature, chunk=chunk)({}, reference, rollout)
            scored = scored.replace(ref_logprobs=ref.logprobs)
        if "critic" in needs and critic is not None:
            with jax.named_scope("critic"):
                values, bootstrap = values_and_bootstrap(critic, join(frozen.critic, critic_params), rollout)
            scored = scored.replace(values=values, bootstrap=bootstrap)
        return scored

    return score


def make_reward_scorer(model: Model, calibration: Calibration | None = None) -> Callable[[Params, Rollout], jax.Array]:
    """(params, rollout) -> f32[B]: (raw - mean) / std of the score at the last `readable` token, end-of-sequence included."""
    calibration = calibration or Calibration()

    def score(params: Params, rollout: Rollout) -> jax.Array:
        raw = score_at_end(model, params, rollout, seen_states(model, params, rollout), calibration.pad_id)
        calibrated = (raw - calibration.mean) / calibration.std
        return calibrated if rollout.packed is None else jnp.where(rollout.packed.inside, calibrated, 0.0)

    return score


def make_sequence_apply(
    model: Model, chunk: int | None = None, *, correct: bool = False
) -> Callable[[Params, Params | None, Sequences], Any]:
    """(params, base, sequences) -> f32[B, T], nats: log-probability of token t given those before it in its own sequence.

    Entry 0, the first token of every packed sequence and padding are 0: nothing predicts them. With `correct` a pair of that
    and bool[B, T], whether no token was likelier than token t.
    """

    def apply(params: Params, base: Params | None, sequences: Sequences) -> Any:
        merged = join(base, params)
        hidden = sequence_states(model, merged, sequences)
        mask = sequences.mask[:, 1:] & sequences.mask[:, :-1]
        if sequences.segments is not None:
            mask &= sequences.segments[:, 1:] == sequences.segments[:, :-1]

        def score(head: Params, states: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
            unembed, options = functools.partial(model.logits, head), {"chunk": chunk, "mask": mask}
            if correct:
                return ops.token_logprobs_and_correct(states, unembed, targets, **options)
            return ops.token_logprobs(states, unembed, targets, **options)[0]

        found = model.by_rows(score, (merged,), hidden[:, :-1], sequences.tokens[:, 1:], mask)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), found)

    return apply


def make_score_apply(model: Model, *, padding: bool = False) -> Callable[[Params, Params | None, Sequences], jax.Array]:
    """(params, base, sequences) -> f32[B, T], the scalar head at every position, 0 where masked.

    With `padding`, where it stands behind the sequences, the network's scores there too, those of transformers: padding sees the
    sequence and no padding, and positions count on (OPT has one of its own for it). With `attention: flash` on a TPU it sees
    padding alone.
    """

    def apply(params: Params, base: Params | None, sequences: Sequences) -> jax.Array:
        merged = join(base, params)
        if padding:
            positions = lax.broadcasted_iota(jnp.int32, sequences.tokens.shape, 1)
            return model.score(merged, model.hidden(merged, sequences.tokens, sequences.mask, positions=positions))
        scores = model.score(merged, sequence_states(model, merged, sequences))
        return jnp.where(sequences.mask, scores, 0.0)

    return apply


def values_and_bootstrap(critic: Model, params: Params, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """Value of the state before every response token f32[B, R], and of the state after the last one f32[B]; one forward pass."""
    seen = seen_states(critic, params, rollout)
    values = by_response(rollout, critic.score(params, before_actions(rollout, seen)))
    return jnp.where(rollout.action_mask, values, 0.0), score_at_end(critic, params, rollout, seen)


def reference_kl(
    model: Model,
    actor: Params,
    states: jax.Array,
    kl_model: Model,
    frozen: Frozen,
    batch: Batch,
    *,
    temperature: float,
    chunk: int | None,
) -> jax.Array:
    """Exact KL(actor || reference) before every action, nats, laid out as `acting_states`; `states` are the actor's."""
    reference = lax.stop_gradient(reference_params(frozen))
    ref_states = lax.stop_gradient(acting_states(kl_model, reference, batch))

    def kl(head: Params, ref_head: Params, states: jax.Array, ref_states: jax.Array, rows: dict[str, Any]) -> jax.Array:
        unembed, ref_unembed = functools.partial(model.logits, head), functools.partial(kl_model.logits, ref_head)
        return ops.token_kl(states, unembed, ref_states, ref_unembed, temperature=temperature, chunk=chunk, **rows)

    return model.by_rows(kl, (actor, reference), states, ref_states, acted(batch)[1])


def reference_params(frozen: Frozen) -> Params:
    """The reference's parameters: its own, the base under the actor's adapter, or an adapter of its own on that base."""
    params = frozen.actor if frozen.reference is None else join(frozen.actor, frozen.reference)
    if params is None:
        raise UserError("a reference is needed and `frozen` holds neither a reference nor the base of an adapter")
    return params


def acting_states(model: Model, params: Params, batch: Batch) -> jax.Array:
    """Hidden states before every action, [B, R, D] or of packed rows [N, T, D]; 0 elsewhere: no head sees what is in padding."""
    return before_actions(batch, seen_states(model, params, batch))


def seen_states(model: Model, params: Params, batch: Batch) -> jax.Array:
    """Hidden states of the prompt's last token and of the response, [B, 1 + R, D]; of packed rows all of them, [N, T, D].

    Nothing looks at those before a prompt's last token, so the model's last layer need not make them.
    """
    chex.assert_rank([batch.tokens, batch.mask, batch.action_mask], 2)
    if (rows := batch.packed) is not None:
        return model.hidden(params, rows.tokens, rows.mask, positions=rows.positions, segments=rows.segments)
    return model.hidden(params, batch.tokens, batch.mask, last=1 + batch.action_mask.shape[1])


def before_actions(batch: Batch, seen: jax.Array) -> jax.Array:
    """Of the `seen_states` those before actions, in the order of `acted`: actions stand together, heads are for them alone."""
    if (rows := batch.packed) is not None:
        return blanked(jnp.take_along_axis(seen, rows.acting[..., None], 1), rows.target_mask)
    return blanked(ops.response_hidden(seen, batch.action_mask.shape[1]), batch.action_mask)


def acted(batch: Batch) -> tuple[jax.Array, dict[str, jax.Array | None]]:
    """Token after each of the `acting_states`; which sampling kept, whether it is an action, whether a head is wanted."""
    if (rows := batch.packed) is None:
        targets = batch.tokens[:, -batch.action_mask.shape[1] :]
        return targets, {"kept": batch.kept, "mask": batch.action_mask, "wanted": None}
    return rows.targets, {"kept": rows.kept, "mask": rows.target_mask, "wanted": rows.target_mask if rows.skips else None}


def by_response(batch: Batch, x: jax.Array) -> jax.Array:
    """What was computed of `acting_states`, by response token: f32[B, R] as it is, f32[N, T] of packed rows -> f32[B, R]."""
    if batch.packed is None:
        return x
    return jnp.where(batch.action_mask, x.ravel()[batch.packed.taken], 0.0)


def score_at_end(model: Model, params: Params, rollout: Rollout, seen: jax.Array, pad_id: int | None = None) -> jax.Array:
    """Scalar head at each sequence's last `readable` token, at the earliest the prompt's last: f32[B], from the `seen_states`."""
    tokens, mask = (x[:, -1 - rollout.action_mask.shape[1] :] for x in (rollout.tokens, rollout.mask))
    ends = readable(tokens, mask, pad_id)
    if (rows := rollout.packed) is not None:
        scores = model.score(params, blanked(seen, rows.mask))  # scalars cross devices, not states
        return jnp.where(rows.inside, scores.ravel()[rows.last - last_place(mask) + last_place(ends)], 0.0)
    return model.score(params, at_last_token(seen, ends))


def readable(tokens: jax.Array, mask: jax.Array, pad_id: int | None) -> jax.Array:
    """bool[B, T]: a reward model's score is read at the last of these tokens: the real ones that are not `pad_id`.

    Where padding is end-of-sequence (GPT-2, Pythia) that is the token *before* the final one, although the mask calls the end
    real. Source: transformers, GenericForSequenceClassification.
    """
    return mask if pad_id is None else mask & (tokens != pad_id)


def sequence_states(model: Model, params: Params, sequences: Sequences) -> jax.Array:
    """Hidden states of every position, [B, T, D], 0 where masked; packed sequences do not see one another."""
    chex.assert_rank([sequences.tokens, sequences.mask], 2)
    states = model.hidden(params, sequences.tokens, sequences.mask, positions=sequences.positions, segments=sequences.segments)
    return blanked(states, sequences.mask)


def blanked(states: jax.Array, mask: jax.Array) -> jax.Array:
    """States [B, T, D] where mask bool[B, T] is True, 0 elsewhere."""
    return jnp.where(mask[..., None], states, jnp.zeros((), states.dtype))


def at_last_token(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x[b, t] of the last t where mask is True: [B, T, ...] -> [B, ...]; of t = 0 in a row without a token."""
    chex.assert_equal_shape_prefix([x, mask], 2)
    return jnp.take_along_axis(x, last_place(mask).reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]


def last_place(mask: jax.Array) -> jax.Array:
    """i32[B], the last t where mask bool[B, T] is True; 0 in a row without one."""
    return jnp.where(mask, lax.broadcasted_iota(jnp.int32, mask.shape, 1), 0).max(1)


def check_temperature(temperature: float) -> None:
    """Raise UserError where scoring could not divide by it."""
    if temperature < config.COLDEST:
        raise UserError(
            f"sampling.temperature is {temperature}; a policy is trained at the temperature it samples at, which must be at "
            f"least {config.COLDEST:g} (0, greedy, is for evaluation)"
        )
