"""PPO's equations against known answers, the whole chain from logits to gradients, and the rules of "What must be right"."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax import config, ops
from rlhf_jax.algorithms import ALGORITHMS, ppo
from rlhf_jax.types import Experience, Rollout, Scored


@functools.cache
def jitted(function, **static):
    """One compilation instead of one per operation."""
    return jax.jit(functools.partial(function, **static))


def arrays(case, *keys):
    return [jnp.asarray(case.inputs[key]) for key in keys]


def response_mask(case):
    return jnp.asarray(case.inputs["response_mask"], bool)


def rollout_of(case):
    """A Rollout of a case's tokens; its last row is truncated where the response has no end-of-sequence."""
    mask = response_mask(case)
    tokens = jnp.asarray(case.inputs["seq"])
    prompt = jnp.asarray(case.inputs["prompts"]) != case.meta.get("pad", 0)
    finished = jnp.any((jnp.asarray(case.inputs["responses"]) == case.meta.get("eos", 1)) & mask, 1)
    return Rollout(
        tokens=tokens,
        mask=jnp.concatenate([prompt, mask], 1),
        action_mask=mask,
        finished=finished,
        logprobs=jnp.zeros(mask.shape),
        index=jnp.arange(mask.shape[0]),
    )


@pytest.fixture(scope="module")
def batch():
    """A rollout of 6 rows with 5 response tokens: full, short, truncated, one token, a hole, empty."""
    rng = np.random.default_rng(0)
    mask = jnp.asarray(
        [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool
    )
    rows, response = mask.shape

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    rollout = Rollout(
        tokens=jnp.asarray(rng.integers(0, 9, (rows, 3 + response)), jnp.int32),
        mask=jnp.concatenate([jnp.ones((rows, 3), bool), mask], 1),
        action_mask=mask,
        finished=jnp.asarray([True, True, False, True, True, True]),
        logprobs=jnp.where(mask, -jnp.abs(normal(rows, response)), 0.0),
        index=jnp.arange(rows),
    )
    scored = Scored(
        logprobs=rollout.logprobs,
        ref_logprobs=jnp.where(mask, rollout.logprobs - 0.1 * normal(rows, response), 0.0),
        values=normal(rows, response),
        bootstrap=normal(rows),
        kl=jnp.abs(normal(rows, response)),
        entropy=jnp.ones((rows, response)),
    )
    return rollout, normal(rows), scored


def experience_of(batch, kl_coef=0.1, **settings):
    rollout, scores, scored = batch
    algorithm = ALGORITHMS["ppo"](config.PPO(**settings))
    return jax.jit(algorithm.make_experience)(rollout, scores, scored, jnp.float32(kl_coef))


# --- known answers


@pytest.mark.parametrize("name", oracles.names("rewards"))
def test_rewards_equal_the_definition(name):
    case = oracles.load("rewards")[name]
    mask = response_mask(case)
    start = case.inputs["prompts"].shape[1] - 1
    logprobs, ref, scores = arrays(case, "log_probs", "ref_log_probs", "reward_score")
    rewards = jitted(ppo.shape_rewards, kl_coef=case.meta["kl_coef"])
    got = rewards(scores, logprobs[:, start:], ref[:, start:], mask)
    oracles.close(got, case.ref["rewards_k1"], where=mask)
    assert not np.asarray(got)[~np.asarray(mask)].any()
    clipped = ppo.adjust_scores(scores, mask[:, 0], clip=case.meta["clip_reward"])
    oracles.close(rewards(clipped, logprobs[:, start:], ref[:, start:], mask), case.ref["rewards_k1_clip5"], where=mask)


@pytest.mark.parametrize("name", oracles.names("gae"))
def test_gae_equals_the_definition(name):
    case = oracles.load("gae")[name]
    mask = response_mask(case)
    rewards, values = arrays(case, "rewards", "values")
    poisoned = (jnp.where(mask, x, jnp.nan) for x in (rewards, values))
    gamma, lam = case.meta["gamma"], case.meta["lam"]
    advantages, returns = jitted(lambda r, v, m, g, lam: ppo.gae(r, v, m, gamma=g, lam=lam))(*poisoned, mask, gamma, lam)
    oracles.close(advantages, case.ref["advantages"], rtol=1e-5, where=mask)
    oracles.close(returns, case.ref["returns"], rtol=1e-5, where=mask)
    if "advantages_whitened" in case.ref and mask.sum() > 1:
        oracles.close(jitted(ops.whiten)(advantages, mask), case.ref["advantages_whitened"], rtol=2e-5, where=mask)


AGGREGATIONS = {
    "token_mean": "token_mean",
    "seq_mean_token_sum": "sequence_mean_token_sum",
    "seq_mean_token_mean": "sequence_mean_token_mean",
    "seq_mean_token_sum_norm": "sequence_mean_token_sum_norm",
}


@pytest.mark.parametrize("name", oracles.names("ppo_policy_loss"))
def test_policy_loss_equals_the_definition(name):
    case = oracles.load("ppo_policy_loss")[name]
    mask = response_mask(case)
    new, old, advantages = arrays(case, "logprobs", "old_logprobs", "advantages")

    clip = {"clip_low": case.meta["clip_low"], "clip_high": case.meta["clip_high"]}

    def loss(new, dual):
        losses, sums = ppo.policy_loss(new, old, advantages, mask, **clip, dual_clip=dual)
        every = jnp.stack([ops.aggregate(losses, mask, kind) for kind in AGGREGATIONS.values()])
        every = every.at[3].multiply(mask.shape[0])  # the reference divides the last one by R, not by B R
        return every, (every, sums)

    @jax.jit
    def everything(new):
        out = {}
        for dual, label in ((None, ""), (case.meta["dual_clip"], "dual3_")):
            grads, (values, sums) = jax.jacrev(functools.partial(loss, dual=dual), has_aux=True)(new)
            for i, kind in enumerate(AGGREGATIONS):
                out[f"loss_{label}{kind}"], out[f"grad_{label}{kind}"] = values[i], grads[i]
        return out, sums

    got, sums = everything(new)
    tokens = max(int(mask.sum()), 1)
    for key, want in case.ref.items():
        if key in got:
            want = np.nan_to_num(want)  # an empty mask gives 0 here
            oracles.close(got[key], want, rtol=1e-5 if key.startswith("grad") or name == "extreme_ratio" else 2e-6, what=key)
            assert np.isfinite(got[key]).all()
    metrics = {
        "clipfrac": "policy/clip_fraction",
        "clipfrac_lower": "policy/dual_clip_fraction",
        "approxkl": "policy/approx_kl_nats",
        "ratio_mean": "policy/ratio_mean",
    }
    for theirs, ours in metrics.items():
        oracles.close(sums[ours] / tokens, np.nan_to_num(case.ref[theirs]), rtol=1e-5, what=theirs)


@pytest.mark.parametrize("name", oracles.names("value_loss"))
def test_value_loss_equals_the_definition(name):
    case = oracles.load("value_loss")[name]
    mask = response_mask(case)
    values, old, returns = arrays(case, "values", "old_values", "returns")

    @jax.jit
    def everything(values):
        out = {}
        for clip_eps, label in ((case.meta["cliprange_value"], ""), (None, "unclipped_")):
            for theirs in ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean"):

                def loss(values, clip_eps=clip_eps, theirs=theirs):
                    losses, sums = ppo.value_loss(values, old, returns, mask, clip_eps=clip_eps)
                    return ops.aggregate(losses, mask, AGGREGATIONS[theirs]), sums

                (value, sums), grad = jax.value_and_grad(loss, has_aux=True)(values)
                out[f"loss_{label}{theirs}"], out[f"grad_{label}{theirs}"] = value, grad
                out.setdefault("clipfrac", sums["value/clip_fraction"] / jnp.maximum(mask.sum(), 1))
                out["mse"] = sums["value/squared_error"] / jnp.maximum(mask.sum(), 1)
        return out

    got = everything(values)
    for key, want in case.ref.items():
        oracles.close(got[key], np.nan_to_num(want), rtol=1e-5 if key.startswith("grad") else 2e-6, what=key)


@pytest.mark.parametrize("name", oracles.names("kl_controller"))
def test_adaptive_kl_equals_the_controller_until_it_would_turn_negative(name):
    case = oracles.load("kl_controller")[name]
    step = jitted(ppo.adapt_kl, target=case.meta["target"], horizon=case.meta["horizon"])
    coef = jnp.float32(case.meta["init_kl_coef"])
    for kl, n, want in zip(case.inputs["kl"], case.inputs["n_steps"], case.ref["value"], strict=True):
        previous, coef = coef, step(coef, kl, n)
        if name == "signflip":
            assert coef > 0
            assert coef >= 0.0999 * previous
        else:
            np.testing.assert_allclose(coef, want, rtol=1e-5)
    assert step(coef, jnp.nan, 4) == coef
    assert step(coef, jnp.inf, 4) == coef


@pytest.mark.parametrize("name", oracles.names("pipeline_ppo"))
def test_the_whole_chain_equals_the_definition(name):
    """Logits -> log-probabilities -> rewards -> advantages -> losses -> gradients with respect to logits and values."""
    case = oracles.load("pipeline_ppo")[name]
    meta, mask = case.meta, response_mask(case)
    rollout = rollout_of(case)
    response = mask.shape[1]
    old_logits, ref_logits, new_logits = arrays(case, "old_logits", "ref_logits", "new_logits")
    old_values, new_values, scores = arrays(case, "old_values", "new_values", "reward_score")
    tokens = rollout.tokens

    def logprobs(logits):
        return ops.logits_logprobs(ops.response_hidden(logits, response), tokens[:, -response:])

    def values(full):
        return ops.response_hidden(full[..., None], response)[..., 0]

    def run(whiten, dual):
        settings = config.PPO(
            gamma=meta["gamma"], lam=meta["lam"], reward_clip=meta["clip_reward"], whiten_advantages=whiten, dual_clip=dual
        )
        scored = Scored(logprobs=logprobs(old_logits), ref_logprobs=logprobs(ref_logits), values=values(old_values))
        experience, _ = ppo.make_experience(settings, rollout, scores, scored, jnp.float32(meta["kl_coef"]))
        counts = ppo.denominators(settings, experience)

        def actor(logits):
            return ppo.minibatch_policy_loss(settings, Scored(logprobs=logprobs(logits)), experience, counts, jnp.float32(0.0))

        def critic(full):
            return ppo.minibatch_value_loss(settings, values(full), experience, counts)

        return (
            experience,
            *jax.value_and_grad(actor, has_aux=True)(new_logits),
            *jax.value_and_grad(critic, has_aux=True)(new_values),
        )

    more = name in ("b8p12r33", "b4p6r10_pad_is_eos")

    @jax.jit
    def everything():
        return run("none", None), run("unbiased", None), (run("population", None), run("unbiased", 3.0)) if more else None

    plain, white, rest = everything()
    ref = case.ref
    loose = 2e-4 if name.startswith(("largelogits", "extreme")) else 1e-5
    oracles.close(logprobs(old_logits), ref["logprobs"][:, -response:], rtol=loose / 5, where=mask)
    oracles.close(plain[0].advantages, ref["advantages"], rtol=loose, where=mask)
    oracles.close(plain[0].returns, ref["returns"], rtol=loose, where=mask)
    oracles.close(plain[1][0], ref["actor_loss_unwhitened"], rtol=loose)
    oracles.close(plain[2], ref["grad_logits_unwhitened"], rtol=loose)
    oracles.close(plain[3][0], ref["critic_loss"], rtol=loose)
    oracles.close(plain[4], ref["grad_values"], rtol=loose)
    oracles.close(white[1][1]["policy/clip_fraction"], ref["clipfrac"], rtol=loose)
    oracles.close(white[3][1]["value/clip_fraction"], ref["vf_clipfrac"], rtol=loose)
    if mask.sum() > 1:
        oracles.close(white[0].advantages, ref["advantages_whitened"], rtol=loose, where=mask)
        oracles.close(white[1][0], ref["actor_loss"], rtol=loose, atol=loose)
        oracles.close(white[2], ref["grad_logits"], rtol=loose)
    if more:
        population, dual = rest
        oracles.close(dual[1][0], ref["actor_loss_dual3"], rtol=loose, atol=loose)
        oracles.close(population[1][0], ref["actor_loss_popwhitened"], rtol=loose, atol=loose)
        oracles.close(population[2], ref["grad_logits_popwhitened"], rtol=loose)


# --- the rules of "What must be right"


def test_rule_1_nan_in_padding_reaches_neither_losses_nor_gradients(batch):
    rollout, scores, scored = batch
    mask = rollout.action_mask

    @jax.jit
    def everything(scored, new, values):
        settings = config.PPO(entropy_coef=0.1, kl_in="loss", kl_estimator="k3")
        experience, metrics = ppo.make_experience(settings, rollout, scores, scored, jnp.float32(0.1))
        counts = ppo.denominators(settings, experience)

        def actor(new):
            now = Scored(logprobs=new, entropy=2.0 * new)
            return ppo.minibatch_policy_loss(settings, now, experience, counts, jnp.float32(0.1))

        def critic(values):
            return ppo.minibatch_value_loss(settings, values, experience, counts)

        return (
            jax.value_and_grad(actor, has_aux=True)(new),
            jax.value_and_grad(critic, has_aux=True)(values),
            metrics,
            experience.advantages,
        )

    clean = everything(scored, scored.logprobs - 0.1, scored.values + 0.1)
    bad = jax.tree.map(lambda x: jnp.where(mask, x, jnp.nan) if x.ndim == 2 else x, scored)
    poisoned = everything(bad, jnp.where(mask, scored.logprobs - 0.1, jnp.nan), jnp.where(mask, scored.values + 0.1, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))


def test_rule_4_the_end_of_sequence_token_is_trained_and_its_value_too(batch):
    rollout, _, scored = batch
    experience, _ = experience_of(batch)
    settings = config.PPO()
    counts = ppo.denominators(settings, experience)
    actor = jax.grad(lambda x: ppo.minibatch_policy_loss(settings, Scored(logprobs=x), experience, counts, jnp.float32(0))[0])(
        scored.logprobs
    )
    critic = jax.grad(lambda x: ppo.minibatch_value_loss(settings, x, experience, counts)[0])(scored.values + 0.01)
    ends = (0, 4), (1, 1), (3, 0), (4, 3)  # last action of each finished row: its end-of-sequence token
    for row, column in ends:
        assert rollout.action_mask[row, column]
        assert actor[row, column] != 0
        assert critic[row, column] != 0
    assert not np.asarray(actor)[~np.asarray(rollout.action_mask)].any()


@pytest.mark.parametrize("name", oracles.names("masks_indices"))
def test_rule_5_the_score_lands_on_the_last_action(name):
    case = oracles.load("masks_indices")[name]
    mask = response_mask(case)
    zeros = jnp.zeros(mask.shape)
    scores = jnp.arange(1.0, mask.shape[0] + 1)
    got = np.asarray(jitted(ppo.shape_rewards, kl_coef=0.1)(scores, zeros, zeros, mask))
    for row, index in enumerate(case.ref["reward_index"].astype(int)):
        want = np.zeros(mask.shape[1])
        if mask[row].any():
            want[index] = scores[row]
        np.testing.assert_array_equal(got[row], want)


def test_rule_5_finished_truncated_and_broken_rows_alike(batch):
    rollout, scores, _ = batch
    zeros = jnp.zeros(rollout.action_mask.shape)
    got = np.asarray(ppo.shape_rewards(scores, zeros, zeros, rollout.action_mask, kl_coef=1.0))
    last = {0: 4, 1: 1, 2: 4, 3: 0, 4: 3}  # row 4 has a hole, row 5 no action at all
    want = np.zeros(got.shape)
    for row, column in last.items():
        want[row, column] = scores[row]
    np.testing.assert_array_equal(got, want)


def test_rule_6_truncated_answers_by_name(batch):
    rollout, scores, scored = batch
    finished = rollout.finished
    subtracted = ppo.adjust_scores(scores, finished, missing_eos="subtract", penalty=0.7)
    np.testing.assert_allclose(subtracted - scores, jnp.where(finished, 0.0, -0.7), atol=1e-6)
    replaced = ppo.adjust_scores(scores, finished, missing_eos="replace", penalty=0.7)
    np.testing.assert_allclose(replaced, jnp.where(finished, scores, -0.7))
    np.testing.assert_array_equal(ppo.adjust_scores(scores, finished), scores)
    both = ppo.adjust_scores(scores * 9, finished, clip=0.5, missing_eos="subtract")  # the penalty is not clipped
    np.testing.assert_allclose(both[2], np.clip(scores[2] * 9, -0.5, 0.5) - 1.0)
    with pytest.raises(ValueError, match="missing_eos 'drop'"):
        ppo.adjust_scores(scores, finished, missing_eos="drop")
    _, metrics = experience_of(batch)
    np.testing.assert_allclose(metrics["response/eos_rate"], 5 / 6, rtol=1e-6)
    plain, _ = experience_of(batch, whiten_advantages="none")
    strapped, _ = experience_of(batch, whiten_advantages="none", bootstrap_truncated=True)
    changed = np.asarray(jnp.any(plain.advantages != strapped.advantages, 1))
    np.testing.assert_array_equal(changed, ~np.asarray(finished))
    np.testing.assert_allclose(strapped.advantages[2, 4] - plain.advantages[2, 4], scored.bootstrap[2], rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_rule_7_the_kl_penalty_by_estimator_and_by_place(batch, estimator):
    rollout, _, scored = batch
    mask = rollout.action_mask
    settings = {"kl_estimator": estimator, "whiten_advantages": "none", "gamma": 0.0}
    with_kl, _ = experience_of(batch, **settings)
    without, _ = experience_of(batch, 0.0, **settings)
    kl = ppo.kl_per_token(scored.logprobs, scored.ref_logprobs, mask, estimator=estimator, exact=scored.kl)
    np.testing.assert_allclose(with_kl.advantages - without.advantages, -0.1 * kl, atol=1e-6)
    in_loss, _ = experience_of(batch, kl_in="loss", **settings)
    np.testing.assert_array_equal(in_loss.advantages, without.advantages)
    chosen = config.PPO(kl_in="loss", **settings)
    counts = ppo.denominators(chosen, in_loss)

    def loss(new, kl_coef):
        now = Scored(logprobs=new, kl=scored.kl)
        return ppo.minibatch_policy_loss(chosen, now, in_loss, counts, kl_coef)[0]

    new = scored.logprobs + 0.01
    kl = ppo.kl_per_token(new, scored.ref_logprobs, mask, estimator=estimator, exact=scored.kl)
    np.testing.assert_allclose(loss(new, 0.5) - loss(new, 0.0), 0.5 * ops.masked_mean(kl, mask), rtol=1e-4, atol=1e-7)
    if estimator == "k1":  # k1 in the loss has the gradient of k2, not a constant
        pull = jax.grad(loss)(new, 1.0) - jax.grad(loss)(new, 0.0)
        want = jnp.where(mask, new - scored.ref_logprobs, 0.0) / mask.sum()
        np.testing.assert_allclose(pull, want, atol=1e-6)


def test_rule_7_the_controller_takes_the_sum_over_a_sequence(batch):
    rollout, scores, scored = batch
    mask = rollout.action_mask
    scored = scored.replace(ref_logprobs=scored.logprobs - 0.1 * mask)
    experience, _ = experience_of((rollout, scores, scored))
    mean = 0.1 * (5 + 2 + 5 + 1 + 3) / 5  # the empty row is no sequence
    settings = config.AdaptiveKL(target=0.3, horizon=60.0)
    want = 0.1 * (1 + (mean / 0.3 - 1) * 5 / 60)
    np.testing.assert_allclose(ppo.next_kl_coef(settings, jnp.float32(0.1), experience), want, rtol=1e-5)
    nothing = experience.replace(action_mask=jnp.zeros_like(mask))
    assert ppo.next_kl_coef(settings, jnp.float32(0.1), nothing) == jnp.float32(0.1)


def test_rule_8_gae_steps_over_tokens_that_are_not_actions():
    """A row with holes has, at its actions, the advantages of the row without them."""
    rng = np.random.default_rng(3)
    rewards, values = (jnp.asarray(rng.normal(size=(1, 4)), jnp.float32) for _ in range(2))
    bootstrap = jnp.asarray([0.4])
    want, want_returns = ppo.gae(rewards, values, jnp.ones((1, 4), bool), bootstrap, gamma=0.9, lam=0.8)
    places = [0, 3, 4, 6]
    wide = [jnp.full((1, 9), jnp.nan).at[0, jnp.asarray(places)].set(x[0]) for x in (rewards, values)]
    mask = jnp.zeros((1, 9), bool).at[0, jnp.asarray(places)].set(True)
    got, got_returns = ppo.gae(*wide, mask, bootstrap, gamma=0.9, lam=0.8)
    np.testing.assert_array_equal(got[:, places], want)
    np.testing.assert_array_equal(got_returns[:, places], want_returns)
    assert not np.asarray(got)[~np.asarray(mask)].any()


def test_rule_8_whitening_is_masked_and_over_the_whole_batch(batch):
    rollout, _, _ = batch
    mask = np.asarray(rollout.action_mask)
    plain, _ = experience_of(batch, whiten_advantages="none")
    raw = np.asarray(plain.advantages, np.float64)[mask]
    for name, ddof in (("unbiased", 1), ("population", 0)):
        got = np.asarray(experience_of(batch, whiten_advantages=name)[0].advantages)
        np.testing.assert_allclose(got[mask], (raw - raw.mean()) / raw.std(ddof=ddof), rtol=1e-4, atol=1e-5)
        assert not got[~mask].any()
    later = experience_of(batch, whiten_advantages="unbiased", whiten_scope="minibatch")[0].advantages
    np.testing.assert_array_equal(later, plain.advantages)  # left to the update
    rewards = np.asarray(experience_of(batch, gamma=0.0, whiten_advantages="none", whiten_rewards="unbiased")[0].returns)
    shaped = np.asarray(experience_of(batch, gamma=0.0, whiten_advantages="none")[0].returns)[mask]
    np.testing.assert_allclose(rewards[mask], (shaped - shaped.mean()) / shaped.std(ddof=1) + shaped.mean(), rtol=1e-4, atol=1e-5)


# --- experience: edges and invariances


def test_a_score_that_is_not_finite_trains_nothing_and_spoils_nothing(batch):
    rollout, scores, scored = batch
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        experience, metrics = experience_of((rollout, scores.at[0].set(bad), scored))
        assert not experience.action_mask[0].any()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((experience.replace(scores=None), metrics)))
        np.testing.assert_allclose(metrics["reward/score"], scores[1:].mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["reward/nonfinite_rate"], 1 / 6, rtol=1e-5)


def test_experience_does_not_depend_on_batch_order_prompt_width_or_padding(batch):
    rollout, scores, scored = batch
    experience, metrics = experience_of(batch)
    order = jnp.asarray([3, 5, 0, 2, 4, 1])
    moved = jax.tree.map(lambda x: x[order], (rollout, scores, scored))
    other, other_metrics = experience_of(moved)
    np.testing.assert_allclose(other.advantages, experience.advantages[order], atol=1e-5)
    for key, value in metrics.items():
        np.testing.assert_allclose(other_metrics[key], value, rtol=1e-4, atol=1e-6, err_msg=key)

    def widen(x):
        return jnp.pad(x, ((0, 0), (0, 3))) if x.ndim == 2 else x

    wider = (jax.tree.map(widen, rollout), scores, jax.tree.map(widen, scored))
    np.testing.assert_allclose(experience_of(wider)[0].advantages[:, :5], experience.advantages, atol=1e-5)


def test_old_logprobs_come_from_where_the_settings_say(batch):
    rollout, scores, scored = batch
    sampled = rollout.replace(logprobs=rollout.logprobs - 0.25 * rollout.action_mask)
    other = (sampled, scores, scored)
    np.testing.assert_array_equal(experience_of(other, old_logprobs="rollout")[0].logprobs, sampled.logprobs)
    experience, metrics = experience_of(other)
    np.testing.assert_array_equal(experience.logprobs, scored.logprobs)
    np.testing.assert_allclose(metrics["rollout/logprob_gap_max_nats"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout/logprob_gap_mean_nats"], 0.25, rtol=1e-5)


def test_metrics_of_a_rollout_are_those_of_its_actions(batch):
    rollout, scores, scored = batch
    _, metrics = experience_of(batch)
    mask = np.asarray(rollout.action_mask)
    np.testing.assert_allclose(metrics["response/length_tokens"], mask.sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/score_std"], np.asarray(scores).std(ddof=1), rtol=1e-5)
    kl = np.where(mask, scored.kl, 0.0)
    np.testing.assert_allclose(metrics["kl/per_token_nats"], kl[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl/per_sequence_nats"], kl.sum(1)[:5].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/entropy_nats"], 1.0, rtol=1e-6)


def test_explained_variance():
    returns = jnp.asarray([[1.0, 2.0, 4.0]])
    mask = jnp.ones((1, 3), bool)
    assert ppo.explained_variance(returns, returns, mask) == 1
    np.testing.assert_allclose(ppo.explained_variance(jnp.ones((1, 3)), returns, mask), 0.0, atol=1e-6)
    assert ppo.explained_variance(returns, jnp.ones((1, 3)), mask) == 0
    assert ppo.explained_variance(-returns, returns, mask) < 0


def test_a_ratio_beyond_float32_stays_finite():
    zeros, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    new = jnp.asarray([[500.0, -500.0]])

    def loss(new):
        return ppo.policy_loss(new, zeros, jnp.asarray([[-1.0, 1.0]]), mask)[0].sum()

    value, grad = jax.value_and_grad(loss)(new)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


# --- what a user can get wrong


def test_what_is_absent_is_named(batch):
    rollout, scores, scored = batch
    with pytest.raises(ValueError, match=r"Scored\.kl is absent"):
        experience_of((rollout, scores, scored.replace(kl=None)), kl_estimator="exact")
    with pytest.raises(ValueError, match=r"Scored\.values is absent"):
        experience_of((rollout, scores, scored.replace(values=None)))
    with pytest.raises(ValueError, match=r"Scored\.bootstrap is absent"):
        experience_of((rollout, scores, scored.replace(bootstrap=None)), bootstrap_truncated=True)
    with pytest.raises(AssertionError):
        experience_of((rollout, scores[:2], scored))
    experience, _ = experience_of(batch)
    settings = config.PPO(entropy_coef=0.1)
    with pytest.raises(ValueError, match=r"entropy_coef 0\.1.*absent"):
        ppo.minibatch_policy_loss(
            settings, Scored(logprobs=scored.logprobs), experience, ppo.denominators(settings, experience), 0.0
        )
    with pytest.raises(ValueError, match="sequence_apply is absent"):
        ppo.build(config.PPO(ptx_coef=1.0)).make_update(None, None, None, None)


def test_rule_12_every_setting_of_ppo_is_read():
    source = Path(ppo.__file__).read_text()
    unread = [field for field in config.PPO.__dataclass_fields__ if f"settings.{field}" not in source]
    assert unread == []


def test_needs_name_what_must_be_scored():
    assert ppo.build(config.PPO()).needs == {"critic", "reference", "entropy"}
    assert "kl" in ppo.build(config.PPO(kl_estimator="exact")).needs
    assert ppo.build(config.PPO(old_logprobs="rollout")).needs == {"critic", "reference"}  # no forward pass of the actor
    assert ppo.build(config.PPO()).group_size == 1


def test_experience_has_a_leading_row_axis_everywhere(batch):
    experience, _ = experience_of(batch)
    assert isinstance(experience, Experience)
    assert {x.shape[0] for x in jax.tree.leaves(experience)} == {6}
