"""KTO: loss, reference point and gradients against float64 definitions, mismatched answers, one z a batch, learning."""

import contextlib
import functools
from types import SimpleNamespace

import bandit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import synthetic_answers

from rlhf_jax import config, offline, ops, parallel, programs, scoring, testing
from rlhf_jax.algorithms import kto, training
from rlhf_jax.types import Frozen, Preferences, Sequences, TrainState


def answers(known, prefix=""):
    """(sequences, policy logits, reference logits) of the answers, or with prefix "KL_" of the mismatched ones."""
    mask = known.inputs[f"{prefix}completion_mask"].astype(bool)
    tokens = jnp.asarray(known.inputs[f"{prefix}input_ids"])
    made = Sequences(tokens=tokens, mask=jnp.ones(mask.shape, bool), target_mask=jnp.asarray(mask))
    return (
        made,
        {"logits": jnp.asarray(known.inputs[f"{prefix}logits"])},
        {"logits": jnp.asarray(known.inputs[f"{prefix}ref_logits"])},
    )


@pytest.mark.parametrize("case", oracles.names("kto"))
def test_loss_and_reference_point_equal_the_definitions(case):
    known = oracles.load("kto")[case]
    batch, params, reference = answers(known)
    other, other_params, other_reference = answers(known, "KL_")
    algorithm = kto.build(
        config.KTO(
            beta=known.meta["beta"],
            desirable_weight=known.meta["desirable_weight"],
            undesirable_weight=known.meta["undesirable_weight"],
        )
    )

    @jax.jit
    def everything(params):
        z = kto.reference_point(
            kto.answer_log_ratio(synthetic_answers.table_apply, other_params, Frozen(reference=other_reference), other)
        )
        whole = kto.Labelled(
            sequences=batch,
            desirable=jnp.asarray(known.inputs["label"] == 1),
            reference_point=jnp.full(batch.tokens.shape[0], z),
        )
        counts = algorithm.denominators(whole)

        def loss(params):
            return algorithm.loss(synthetic_answers.table_apply, params, Frozen(reference=reference), whole, counts)[0]

        return z, *jax.value_and_grad(loss)(params)

    z, loss, grad = everything(params)
    oracles.close(z, known.ref["kl_kto"])
    oracles.close(loss, known.ref["loss_kto"])
    oracles.close(grad["logits"], gradient(known), rtol=1e-5)


def gradient(known):
    """d loss / d logits in float64, by hand: d loss / d q_i = -+ w beta s (1 - s) / B, none through z."""
    inputs, meta = known.inputs, known.meta
    tokens, targets = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:].astype(bool)
    logp = {side: testing.log_softmax(inputs[side][:, :-1]) for side in ("logits", "ref_logits")}
    chosen = {side: np.take_along_axis(x, tokens[..., None], 2)[..., 0] for side, x in logp.items()}
    q = np.where(targets, chosen["logits"] - chosen["ref_logits"], 0.0).sum(1)
    s = 1 / (1 + np.exp(-meta["beta"] * (q - known.ref["kl_kto"])))
    weight = np.where(inputs["label"] == 1, -meta["desirable_weight"], meta["undesirable_weight"])
    by_q = weight * meta["beta"] * s * (1 - s) / len(q)
    by_logits = np.eye(logp["logits"].shape[-1])[tokens] - np.exp(logp["logits"])
    return np.pad(by_q[:, None, None] * targets[..., None] * by_logits, ((0, 0), (0, 1), (0, 0)))


def test_the_reference_point_is_not_below_zero_and_has_no_gradient():
    assert float(kto.reference_point(jnp.asarray([-1.0, -2.0, 0.5]))) == 0.0
    np.testing.assert_array_equal(jax.grad(lambda x: kto.reference_point(x))(jnp.asarray([1.0, 2.0])), 0.0)


def test_mismatched_rows_have_the_next_row_s_answer():
    def row(prompt, answer, width=7):
        tokens = prompt + answer
        pad = [0] * (width - len(tokens))
        return (
            tokens + pad,
            [True] * len(tokens) + [False] * len(pad),
            [False] * len(prompt) + [True] * len(answer) + [False] * len(pad),
        )

    rows = [row([1, 2, 3], [11, 12]), row([4], [13, 14, 15]), row([5, 6, 7, 8, 9], [16, 17])]
    tokens, mask, targets = (np.asarray(part) for part in zip(*rows, strict=True))
    made = jax.jit(kto.mismatched)(
        Sequences(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), target_mask=jnp.asarray(targets))
    )
    want = [row([1, 2, 3], [13, 14, 15]), row([4], [16, 17]), row([5, 6, 7, 8, 9], [11, 12])]
    for got, part in zip((made.tokens, made.mask, made.target_mask), zip(*want, strict=True), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(part))


def test_mismatched_answers_are_cut_where_the_row_ends():
    tokens = jnp.asarray([[1, 2, 3, 11], [4, 12, 13, 14]])
    targets = jnp.asarray([[False, False, False, True], [False, True, True, True]])
    made = kto.mismatched(Sequences(tokens=tokens, mask=jnp.ones((2, 4), bool), target_mask=targets))
    np.testing.assert_array_equal(made.tokens, [[1, 2, 3, 12], [4, 11, 0, 0]])
    np.testing.assert_array_equal(made.mask, [[True] * 4, [True, True, False, False]])
    np.testing.assert_array_equal(made.target_mask, [[False, False, False, True], [False, True, False, False]])


def make_update(algorithm, tx, micro_batches=1):
    apply = scoring.make_sequence_apply(bandit.MODEL, 128)

    def bound(p, frozen, batch):
        return apply(p, frozen.actor, batch)

    return training.make_offline_update(
        functools.partial(algorithm.loss, bound),
        algorithm.denominators,
        tx,
        micro_batches,
        prepare=functools.partial(algorithm.prepare, bound),
    )


def test_the_reference_point_is_that_of_the_whole_batch_for_every_split():
    params, other = (bandit.MODEL.init(jax.random.key(i)) for i in (0, 1))
    batch, tx = bandit.pairs(), optax.sgd(1.0)
    algorithm = kto.build(config.KTO(undesirable_weight=1.3))
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))

    @jax.jit
    def everything(state):
        return {parts: make_update(algorithm, tx, parts)(state, batch, Frozen(reference=other)) for parts in (1, 3, 12)}

    found = everything(state)
    assert float(found[1][1]["kto/reference_point_nats"]) > 0.01
    for parts in (3, 12):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), found[parts], found[1])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rows_that_fill_a_batch_are_not_in_the_reference_point(micro_batches):
    params, other = (bandit.MODEL.init(jax.random.key(i)) for i in (0, 1))
    apply = scoring.make_sequence_apply(bandit.MODEL, 128)
    batch = kto.labelled(testing.random_preferences(3, 3, 6, bandit.VOCAB))

    def z(batch, parts=1):
        made = kto.prepare(lambda p, f, b: apply(p, f.actor, b), params, Frozen(reference=other), batch, parts)
        return float(made.reference_point[0])

    def filled(*rows):
        """These rows of the batch, where they stand; the others empty."""
        there = jnp.zeros((6, 1), bool).at[jnp.asarray(rows)].set(True)
        sequences = batch.sequences
        return batch.replace(sequences=sequences.replace(mask=sequences.mask & there, target_mask=sequences.target_mask & there))

    rows = (0, 2, 3)
    alone = z(jax.tree.map(lambda x: x[jnp.asarray(rows)], batch))
    assert alone > 0.01
    assert z(filled(*rows), micro_batches) == pytest.approx(alone, rel=1e-5)
    assert z(filled(1), micro_batches) == 0.0  # one answer has no other's to go with


def test_evaluation_weights_every_metric_by_the_answers_that_it_counts():
    """The classes' rewards over uneven batches are those of one batch of all answers."""
    params, other = (bandit.MODEL.init(jax.random.key(i)) for i in (0, 1))
    whole = kto.labelled(testing.random_preferences(3, 4, 6, bandit.VOCAB))
    whole = whole.replace(desirable=jnp.arange(8) == 1)  # the second batch has none
    run = SimpleNamespace(model=config.Model(), micro_batches=1)
    mesh, tx = parallel.make_mesh(config.Mesh(), jax.devices()[:1]), optax.sgd(1.0)
    shapes = jax.tree.map(lambda x: programs.abstract(x.shape, x.dtype, parallel.replicated(mesh)), params)
    state = programs.abstract_offline_state(mesh, tx, shapes)
    do = programs.offline_programs("kto", run, kto.build(config.KTO()), bandit.MODEL, tx, state, Frozen())
    rows = []

    def part(first, size):
        return jax.tree.map(lambda x: x[first : first + size], whole), None

    def batches(size, most):
        return [part(first, size) for first in range(0, 8 if most is None else most, size)]

    def evaluated(size, most):
        setup = SimpleNamespace(
            plan=SimpleNamespace(data=SimpleNamespace(eval_batches=functools.partial(batches, size))),
            settings=SimpleNamespace(log=config.Log(eval_rows=most)),
            evaluate=do["evaluate"].compile(),
            frozen=Frozen(reference=other),
            place=lambda batch: batch,
            scalar=jnp.float32,
        )
        recorder = SimpleNamespace(phase=lambda name: contextlib.nullcontext(), log=lambda step, found: rows.append(found))
        session = SimpleNamespace(recorder=recorder, watchdog=SimpleNamespace(pause=lambda: None))
        offline.evaluate(setup, programs.init_offline_state(tx, params), session, 0)
        return rows[-1]

    one, several = evaluated(8, None), evaluated(4, None)
    for name in ("kto/eval_desirable_reward", "kto/eval_undesirable_reward"):
        assert several[name] == pytest.approx(one[name], rel=1e-5), name
    some = evaluated(4, 4)
    assert abs(some["kto/eval_undesirable_reward"] - one["kto/eval_undesirable_reward"]) > 1e-6, "log.eval_rows are enough"


def test_an_answer_without_a_token_is_left_out():
    batch = kto.labelled(testing.random_preferences(0, 3, 6, bandit.VOCAB))
    none = batch.replace(sequences=batch.sequences.replace(target_mask=batch.sequences.target_mask.at[0].set(False)))
    counts = kto.denominators(none)
    assert [float(counts[name]) for name in ("answers", "desirable", "undesirable")] == [5.0, 2.0, 3.0]


def test_pairs_become_good_and_bad_answers():
    pairs = testing.random_preferences(0, 3, 6, bandit.VOCAB)
    batch = kto.labelled(pairs)
    np.testing.assert_array_equal(batch.desirable, [True] * 3 + [False] * 3)
    np.testing.assert_array_equal(batch.sequences.tokens[3:], pairs.rejected.tokens)
    assert kto.labelled(batch) is batch


def test_one_prompt_cannot_be_mismatched():
    one = jax.tree.map(lambda x: x[:1], testing.random_preferences(0, 3, 6, bandit.VOCAB))
    assert isinstance(one, Preferences)
    with pytest.raises(ValueError, match="batch_size is 1: KTO pairs every prompt with another"):
        kto.prepare(lambda *_: jnp.zeros((2, 6)), {}, Frozen(reference={}), one)


def test_a_beta_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"kto.beta is 0; it must be above 0"):
        kto.build(config.KTO(beta=0.0))


def test_learns():
    tx = optax.adam(0.1)
    update = make_update(kto.build(config.KTO(beta=0.5)), tx)
    params = jax.tree.map(lambda x: 0.3 * x, bandit.MODEL.init(jax.random.key(0)))
    batch, frozen = bandit.pairs(), Frozen(reference=params)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))
    run = jax.jit(lambda state: jax.lax.scan(lambda state, _: update(state, batch, frozen), state, None, length=150))
    state, metrics = run(state)
    rewards = metrics["kto/desirable_reward"] - metrics["kto/undesirable_reward"]
    assert float(rewards[-1]) > 1.0, rewards[-1]
    assert float(bandit.right_probability(state.params)) > 5 * float(bandit.right_probability(params))


def test_the_table_model_of_these_tests_shifts_as_the_oracle_does():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32)
    tokens = jnp.asarray([[0, 2, 1]])
    made = synthetic_answers.table_apply(
        {"logits": logits}, None, Sequences(tokens=tokens, mask=tokens >= 0, target_mask=tokens >= 0)
    )
    np.testing.assert_allclose(made[0, 1:], ops.logits_logprobs(logits[0, :2], tokens[0, 1:]))
