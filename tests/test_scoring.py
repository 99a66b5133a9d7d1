"""Scores of sequences against float64 recurrences, against the sampler, and their gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config, models, ops, sampling, scoring, testing
from rlhf_jax.errors import UserError
from rlhf_jax.types import Calibration, Frozen, Model, Rollout, Scored, Sequences

V, P, R, DECAY = 7, 5, 9, 0.6
MODEL = testing.markov_model(V, decay=DECAY)
ACTOR, CRITIC, REFERENCE = (MODEL.init(jax.random.key(i)) for i in range(3))
EVERYTHING = frozenset({"critic", "reference", "kl", "entropy"})


@functools.cache
def answers(**keys) -> Rollout:
    how = config.Sampling(**{"max_new_tokens": R} | keys)
    sample = jax.jit(sampling.make_sampler(MODEL, how, stop_ids=(1, 2), pad_id=0))
    return sample(ACTOR, testing.random_prompts(0, 6, P, V, shortest=0), jax.random.key(0))


def logprob_rows(params, rollout: Rollout, temperature: float) -> np.ndarray:
    """Log-probabilities of every token before each response token, f64[B, R, V], on the kept tokens."""
    logits = testing.history_logits(params, rollout.tokens, rollout.mask, decay=DECAY)[:, P - 1 : -1] / temperature
    if rollout.kept is not None:
        kept = np.asarray(ops.unpack_kept(rollout.kept, V)) | ~np.asarray(rollout.action_mask)[..., None]
        logits = np.where(kept, logits, -np.inf)
    return testing.log_softmax(logits)


def chosen(rows: np.ndarray, rollout: Rollout) -> np.ndarray:
    picked = np.take_along_axis(rows, np.asarray(rollout.tokens)[:, P:, None], 2)[..., 0]
    return np.where(rollout.action_mask, picked, 0.0)


@pytest.mark.parametrize("keys", [{"temperature": 0.7}, {"temperature": 1.4, "top_p": 0.8}], ids=["temperature", "filters"])
def test_everything_about_a_rollout(keys: dict):
    rollout = answers(**keys)
    score = jax.jit(scoring.make_scorer(MODEL, MODEL, temperature=keys["temperature"], chunk=4, needs=EVERYTHING))
    scored: Scored = score(ACTOR, CRITIC, Frozen(reference=REFERENCE), rollout)
    actor, reference = (logprob_rows(params, rollout, keys["temperature"]) for params in (ACTOR, REFERENCE))
    np.testing.assert_allclose(scored.logprobs, chosen(actor, rollout), atol=3e-6)
    np.testing.assert_allclose(scored.logprobs, rollout.logprobs, atol=3e-6)
    np.testing.assert_allclose(scored.ref_logprobs, chosen(reference, rollout), atol=3e-6)
    p = np.exp(actor)
    finite = np.where(p > 0, actor, 0.0)
    np.testing.assert_allclose(scored.entropy, np.where(rollout.action_mask, -(p * finite).sum(-1), 0), atol=3e-6)
    kl = (p * (finite - np.where(p > 0, reference, 0.0))).sum(-1)
    np.testing.assert_allclose(scored.kl, np.where(rollout.action_mask, kl, 0), atol=5e-6)
    values = testing.history_scores(CRITIC, rollout.tokens, rollout.mask, decay=DECAY)
    np.testing.assert_allclose(scored.values, np.where(rollout.action_mask, values[:, P - 1 : -1], 0), atol=5e-6)
    np.testing.assert_allclose(scored.bootstrap, values[:, -1], atol=5e-6)  # the recurrence stands still after the last token


def test_only_what_is_needed_and_old_logprobs_from_the_rollout():
    rollout = answers(temperature=0.7)
    calls = []
    spy = dataclasses.replace(MODEL, hidden=lambda *args, **kw: calls.append(1) or MODEL.hidden(*args, **kw))
    scored = scoring.make_scorer(spy, needs=(), old_logprobs="rollout")(ACTOR, None, Frozen(), rollout)
    assert not calls
    np.testing.assert_array_equal(scored.logprobs, rollout.logprobs)
    assert scored.values is scored.bootstrap is scored.ref_logprobs is scored.kl is scored.entropy is None
    scored = scoring.make_scorer(spy, temperature=0.7, needs={"entropy"}, old_logprobs="rollout")(ACTOR, None, Frozen(), rollout)
    assert len(calls) == 1
    np.testing.assert_array_equal(scored.logprobs, rollout.logprobs)
    assert scored.entropy is not None


def test_trained_and_frozen_parameters_are_joined():
    """As with LoRA: what is trained wins over the frozen base, and the base is the reference."""
    rollout = answers(temperature=0.7)
    score = scoring.make_scorer(MODEL, MODEL, temperature=0.7)
    frozen = Frozen(actor=REFERENCE, critic={"scores": CRITIC["scores"]})
    scored = score({"table": ACTOR["table"]}, {"table": CRITIC["table"]}, frozen, rollout)
    alone = score(ACTOR, CRITIC, Frozen(reference=REFERENCE), rollout)
    for name in ("logprobs", "ref_logprobs", "values", "bootstrap"):
        np.testing.assert_array_equal(getattr(scored, name), getattr(alone, name), err_msg=name)
    with pytest.raises(UserError, match="neither a reference nor the base"):
        scoring.make_scorer(MODEL, needs={"reference"})(ACTOR, None, Frozen(), rollout)


def with_heads(model: Model) -> Model:
    """Heads with a parameter of their own, as real ones have."""
    return dataclasses.replace(
        model,
        logits=lambda params, hidden: MODEL.logits(params, hidden) * params["scale"],
        score=lambda params, hidden: MODEL.score(params, hidden) * params["scale"],
    )


def poisoned(params, tokens, mask, **keys):
    """Hidden states, NaN after the last token."""
    ends = jnp.cumsum(mask[:, ::-1], 1)[:, ::-1] == 0
    states = MODEL.hidden(params, tokens, mask, **keys)
    return jnp.where(ends[:, -states.shape[1] :, None], jnp.nan, states)


def test_padding_reaches_neither_values_nor_gradients():
    """NaN in the padding's hidden states leaves every result and gradient as it was."""
    rollout = answers(temperature=0.7)
    sequences = testing.random_sequences(0, 3, 8, V)
    good = with_heads(MODEL)
    bad = dataclasses.replace(good, hidden=poisoned)
    params, reference = ({**tree, "scale": jnp.float32(1.1)} for tree in (ACTOR, REFERENCE))

    def everything(model, params):
        apply = scoring.make_policy_apply(model, temperature=0.7, chunk=4, entropy=True, kl_model=good)
        scored = apply(params, Frozen(reference=reference), rollout)
        values = scoring.make_value_apply(model)(params, Frozen(), rollout)
        _, bootstrap = scoring.values_and_bootstrap(model, params, rollout)
        rewards = scoring.make_reward_scorer(model)(params, rollout)
        text = scoring.make_sequence_apply(model, 3)(params, None, sequences)
        scores = scoring.make_score_apply(model)(params, None, sequences)
        return scored.logprobs, scored.entropy, scored.kl, values, bootstrap, rewards, text, scores

    def loss(model, params):
        found = everything(model, params)
        return sum((jnp.arange(x.size).reshape(x.shape) * x).sum() for x in found), found

    one, other = (jax.jit(jax.value_and_grad(functools.partial(loss, m), has_aux=True))(params) for m in (bad, good))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_kl_has_a_gradient_for_the_actor_alone():
    rollout = answers(temperature=0.7)
    model = with_heads(MODEL)
    apply = scoring.make_policy_apply(model, temperature=0.7, kl_model=model)

    def kl(params, reference):
        return apply(params, Frozen(reference=reference), rollout).kl.sum()

    params, reference = ({**tree, "scale": jnp.float32(1.1)} for tree in (ACTOR, REFERENCE))
    ours, theirs = jax.jit(jax.grad(kl, argnums=(0, 1)))(params, reference)
    assert float(jnp.abs(ours["table"]).max()) > 0.01
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(theirs))


def test_last_true_token():
    mask = jnp.asarray([[True, True, False], [False, True, True], [False, True, False], [False, False, False]])
    found = scoring.at_last_token(jnp.arange(24.0).reshape(4, 3, 2), mask)
    np.testing.assert_array_equal(found[:, 0], [2, 10, 14, 18])


def test_score_stands_at_the_last_true_token():
    """Finished, truncated and empty answers; padding in front or behind changes nothing."""
    rollout = answers(temperature=0.7)
    empty = rollout.replace(action_mask=rollout.action_mask.at[0].set(False), mask=rollout.mask.at[0, P:].set(False))
    scores = testing.history_scores(CRITIC, empty.tokens, empty.mask, decay=DECAY)
    got = scoring.make_reward_scorer(MODEL, Calibration(mean=0.5, std=2.0))(CRITIC, empty)
    np.testing.assert_allclose(got, (scores[:, -1] - 0.5) / 2.0, atol=3e-6)
    assert not bool(empty.action_mask[0].any())


def test_a_score_is_read_where_transformers_reads_it():
    """At the last token that is not padding, also where padding is end-of-sequence; no further back than the prompt's last."""
    rollout = answers(temperature=0.7)
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    scores = testing.history_scores(CRITIC, tokens, mask, decay=DECAY)
    ends = []
    for pad_id in (None, 1, 2):
        last = [
            max(t for t in range(P + R) if row[t] and (t < P or ids[t] != pad_id)) for ids, row in zip(tokens, mask, strict=True)
        ]
        got = scoring.make_reward_scorer(MODEL, Calibration(mean=0.5, std=2.0, pad_id=pad_id))(CRITIC, rollout)
        np.testing.assert_allclose(got, (scores[np.arange(len(last)), last] - 0.5) / 2.0, atol=3e-6)
        ends.append(last)
    assert ends[0] != ends[1] != ends[2] != ends[0]


def test_sequences_and_packed_sequences():
    sequences = testing.random_sequences(0, 3, 8, V)
    apply = jax.jit(scoring.make_sequence_apply(MODEL, chunk=3))
    logits = testing.history_logits(ACTOR, sequences.tokens, sequences.mask, decay=DECAY)
    rows = testing.log_softmax(logits[:, :-1])
    want = np.take_along_axis(rows, np.asarray(sequences.tokens)[:, 1:, None], 2)[..., 0]
    want = np.pad(np.where(sequences.mask[:, 1:], want, 0.0), ((0, 0), (1, 0)))
    got = apply(ACTOR, None, sequences)
    np.testing.assert_allclose(got, want, atol=3e-6)
    again, correct = jax.jit(scoring.make_sequence_apply(MODEL, chunk=3, correct=True))(ACTOR, None, sequences)
    np.testing.assert_allclose(again, want, atol=3e-6)
    likeliest = np.pad(rows.argmax(-1) == np.asarray(sequences.tokens)[:, 1:], ((0, 0), (1, 0)))
    np.testing.assert_array_equal(correct, likeliest & np.asarray(sequences.mask))
    scores = jax.jit(scoring.make_score_apply(MODEL))(ACTOR, None, sequences)
    want_scores = testing.history_scores(ACTOR, sequences.tokens, sequences.mask, decay=DECAY)
    np.testing.assert_allclose(scores, np.where(sequences.mask, want_scores, 0.0), atol=3e-6)
    lengths = np.asarray(sequences.mask.sum(1))
    parts = [(np.asarray(sequences.tokens)[i, :n], i) for i, n in enumerate(lengths)]
    tokens = np.concatenate([part for part, _ in parts] + [np.zeros(2, int)])
    segments = np.concatenate([np.full(len(part), i + 1) for part, i in parts] + [np.zeros(2, int)])
    positions = np.concatenate([np.arange(len(part)) for part, _ in parts] + [np.zeros(2, int)])
    packed = Sequences(
        tokens=jnp.asarray(tokens, jnp.int32)[None],
        mask=jnp.asarray(segments > 0)[None],
        target_mask=jnp.asarray(segments > 0)[None],
        segments=jnp.asarray(segments, jnp.int32)[None],
        positions=jnp.asarray(positions, jnp.int32)[None],
    )
    flat = np.concatenate([np.asarray(got)[i, :n] for i, n in enumerate(lengths)] + [np.zeros(2)])
    np.testing.assert_allclose(apply(ACTOR, None, packed)[0], flat, atol=3e-6)
    flat = np.concatenate([np.asarray(scores)[i, :n] for i, n in enumerate(lengths)] + [np.zeros(2)])
    np.testing.assert_allclose(jax.jit(scoring.make_score_apply(MODEL))(ACTOR, None, packed)[0], flat, atol=3e-6)


def test_sampled_logprobs_equal_scored_ones_on_the_real_decoder():
    model = models.make_model(models.scratch_spec(testing.tiny_scratch(), 64))
    params = model.init(jax.random.key(0))
    prompts = testing.random_prompts(3, 6, P, 64, shortest=0)
    how = config.Sampling(max_new_tokens=R, temperature=0.8, top_k=30, top_p=0.9, min_new_tokens=2)
    rollout = jax.jit(sampling.make_sampler(model, how, stop_ids=(1, 2, 3), pad_id=0))(params, prompts, jax.random.key(1))
    score = jax.jit(scoring.make_scorer(model, temperature=how.temperature, chunk=4, needs=()))
    scored = score(params, None, Frozen(), rollout)
    assert float(jnp.abs(scored.logprobs - rollout.logprobs).max()) < 1e-4  # first update's ratio is 1
    assert float(scored.logprobs.min()) < -1


def test_greedy_answers_have_no_logprob_and_a_missing_critic_is_named():
    for temperature in (0.0, 1e-10):
        with pytest.raises(UserError, match=f"sampling.temperature is {temperature}; .* must be at least 0.0001"):
            scoring.make_policy_apply(MODEL, temperature=temperature)
    with pytest.raises(UserError, match="critic"):
        scoring.make_scorer(MODEL, needs={"critic"})
