"""Packed scoring and updates: the numbers of the plain ones, from as many rows as the sequences fill."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import checks, config, ops, packed, parallel, programs, sampling, scoring, setups_abstract, testing
from rlhf_jax.data.packing import packed_rows
from rlhf_jax.types import Calibration, Frozen, Rollout, TrainState

V, P, R, B, WIDTH = 11, 6, 10, 12, 24
MODEL = testing.markov_model(V, decay=0.6)
ACTOR, CRITIC, REFERENCE = (MODEL.init(jax.random.key(i)) for i in range(3))
PACKING = packed.Packing(rows=2, width=WIDTH)


def rollouts() -> Rollout:
    how = config.Sampling(max_new_tokens=R, top_p=0.9)
    sample = jax.jit(sampling.make_sampler(MODEL, how, stop_ids=(1, 2), pad_id=0))
    return sample(ACTOR, testing.random_prompts(0, B, P, V), jax.random.key(0))


def close(got, expected, tolerance: float = 2e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def parts_of(batch, wanted=None) -> tuple[packed.Layout, list]:
    layout = packed.lay_out(PACKING, batch, wanted)
    return layout, [packed.part(batch, layout, jnp.int32(n)) for n in range(int(layout.parts))]


@pytest.mark.parametrize("seed", range(4))
def test_every_token_stands_once_behind_the_one_before_it(seed: int):
    batch = testing.random_rollout(seed, B, P, R, V)
    tokens, mask, actions = (np.asarray(x) for x in (batch.tokens, batch.mask, batch.action_mask))
    layout, parts = parts_of(batch)
    lengths = mask.sum(1)
    assert int(layout.rows) == packed_rows(lengths, WIDTH) < B
    assert len(parts) == -(-int(layout.rows) // PACKING.rows)
    found = dict.fromkeys(range(B), 0)
    for part in parts:
        rows = jax.tree.map(np.asarray, part.packed)
        assert rows.mask.sum() == lengths[rows.inside].sum()
        for b in np.flatnonzero(rows.inside):
            found[b] += 1
            slots = np.arange(rows.last[b] - lengths[b] + 1, rows.last[b] + 1)
            row = slots // WIDTH
            assert (row == row[0]).all()
            np.testing.assert_array_equal(rows.tokens.ravel()[slots], tokens[b][mask[b]])
            np.testing.assert_array_equal(rows.positions.ravel()[slots], np.arange(lengths[b]))
            segment = rows.segments.ravel()[slots[0]]
            assert segment > 0
            assert (rows.segments == segment).sum() == lengths[b]
            n = actions[b].sum()
            taken = rows.taken[b, :n]
            assert rows.target_mask.ravel()[taken].all()
            np.testing.assert_array_equal(row[0] * WIDTH + rows.acting.ravel()[taken], slots[-n - 1 : -1])
            np.testing.assert_array_equal(rows.targets.ravel()[taken], tokens[b][mask[b]][-n:])
        assert rows.target_mask.sum() == actions[rows.inside].sum()
        assert (np.diff(rows.target_mask.astype(int), axis=1) <= 0).all()  # actions first, so that a head may stop after them
    assert set(found.values()) == {1}


def test_what_is_not_wanted_takes_no_row():
    batch = testing.random_rollout(0, B, P, R, V)
    wanted = jnp.arange(B) % 3 == 0
    layout, parts = parts_of(batch, wanted)
    assert int(layout.rows) == packed_rows(np.asarray(batch.mask.sum(1))[wanted], WIDTH)
    np.testing.assert_array_equal(sum(part.packed.inside for part in parts), wanted)
    layout, parts = parts_of(batch, jnp.zeros(B, bool))
    assert int(layout.rows) == 0
    assert not parts[0].packed.mask.any()


@pytest.mark.parametrize("old_logprobs", ["recompute", "rollout"])
def test_scores_are_those_of_the_plain_batch(old_logprobs: str):
    def hidden(params, tokens, mask, *, positions=None, last=None, **keys):
        """What depends on positions themselves, not on distances alone."""
        positions = jnp.cumsum(mask, 1) - 1 if positions is None else positions
        states = MODEL.hidden(params, tokens, mask, positions=positions, **keys) * (1 + 0.1 * positions)[..., None]
        return states if last is None else states[:, -last:]

    rollout, needs = (
        rollouts(),
        {"critic", "reference", "kl", "entropy"} - ({"kl", "entropy"} if old_logprobs == "rollout" else set()),
    )
    model = dataclasses.replace(MODEL, hidden=hidden)
    score = scoring.make_scorer(model, model, chunk=3, needs=needs, old_logprobs=old_logprobs)
    frozen = Frozen(reference=REFERENCE)
    plain = jax.jit(score)(ACTOR, CRITIC, frozen, rollout)
    close(jax.jit(lambda x: packed.summed(PACKING, lambda part: score(ACTOR, CRITIC, frozen, part), x))(rollout), plain)
    for pad_id in (None, 1):  # which ends some answers
        reward = scoring.make_reward_scorer(MODEL, Calibration(0.3, 2.0, pad_id))
        close(packed.summed(PACKING, lambda part, reward=reward: reward(CRITIC, part), rollout), reward(CRITIC, rollout))


LLAMA = config.Model(
    scratch=config.Scratch(width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, vocabulary=64), logprob_chunk=8
)
STAGES = {
    "ppo": config.PPORun(ppo=config.PPO(entropy_coef=0.01, kl_estimator="exact", kl_in="loss", whiten_scope="minibatch")),
    "grpo": config.GRPORun(grpo=config.GRPO(group_size=2, drop_uninformative=True)),
    "gspo": config.GSPORun(gspo=config.GSPO(group_size=4, aggregation="sequence_mean_token_sum_norm")),
}
ANSWERS, MINIBATCHES = 16, 2


def the_run(stage: str, *, packing: bool, parts: int = 4) -> config.OnlineRun:
    run = STAGES[stage]
    return dataclasses.replace(
        run,
        model=LLAMA,
        batch_size=ANSWERS,
        data=config.Data(task="reviews", max_prompt_tokens=P, max_tokens=WIDTH, packing=packing),
        sampling=config.Sampling(max_new_tokens=R, top_p=0.95),
        **{stage: dataclasses.replace(getattr(run, stage), epochs=2, minibatches=MINIBATCHES, micro_batches=parts)},
    )


def given(abstract: tuple) -> tuple:
    """A state, frozen models, a rollout and scores, random, for the shapes of an update's arguments."""
    rng = np.random.default_rng(1)

    def weights(leaf: Any) -> np.ndarray:
        return np.asarray(0.2 * rng.normal(size=leaf.shape) if leaf.ndim > 1 else np.ones(leaf.shape), leaf.dtype)

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)

    def new(trained: TrainState | None) -> TrainState | None:
        return None if trained is None else zeros(trained).replace(params=jax.tree.map(weights, trained.params))

    state, frozen, rollout, _ = abstract
    state = zeros(state).replace(actor=new(state.actor), critic=new(state.critic), kl_coef=np.float32(0.1))
    kept = rng.random((*rollout.kept.shape[:2], 64)) > 0.2
    rollout = testing.random_rollout(3, ANSWERS, P, R, 64).replace(kept=ops.pack_kept(jnp.asarray(kept)))
    scores = np.asarray(rng.integers(0, 2, ANSWERS), np.float32)  # some groups agree
    return jax.device_put((state, jax.tree.map(weights, frozen), rollout, scores), programs.shardings(abstract))


def steps(run: config.OnlineRun, stage: str, mesh: config.Mesh | None = None) -> tuple:
    """Scores of a random rollout, an update's first moments and its metrics."""
    devices = parallel.make_mesh(mesh or config.Mesh(), jax.devices()[: 8 if mesh else 1])
    made = setups_abstract.abstract_programs(stage, run, devices)[0]
    state, *rest = given(made["learn"].args[:4])
    score, learn = made["score"].compile(), made["learn"].compile()
    scored = score(state.actor.params, state.critic and state.critic.params, *rest[:2])
    state, metrics = learn(state, *rest, scored, jax.random.key(5), None)
    assert score._cache_size() == learn._cache_size() == 1
    moments = [optax.tree_utils.tree_get(one.opt_state, "mu") for one in (state.actor, state.critic) if one]
    return jax.device_get((scored, moments, metrics))


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_is_that_of_the_plain_batch(stage: str):
    plain, found = (steps(the_run(stage, packing=packing), stage) for packing in (False, True))
    padded = found[2].pop("data/padded_fraction")
    assert padded < (0.25 if stage == "ppo" else 0.5)  # of 24 rows; where groups agree, nothing is trained and few rows are used
    close(found, plain, 1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="one simulated device: nothing to compare")
def test_the_mesh_changes_no_number():
    mesh = config.Mesh(data=2, fsdp=2, tensor=2)
    alone, spread = (steps(the_run("ppo", packing=True, parts=2), "ppo", where) for where in (None, mesh))
    assert spread[2].pop("data/padded_fraction") != alone[2].pop("data/padded_fraction")  # four devices have a row each
    close(spread, alone, 5e-6)


def test_only_as_many_parts_are_computed_as_the_sequences_fill():
    rollout, ran = testing.random_rollout(5, B, P, R, V), []

    def hidden(*args, **keys):
        jax.debug.callback(lambda: ran.append(1))
        return MODEL.hidden(*args, **keys)

    reward = scoring.make_reward_scorer(dataclasses.replace(MODEL, hidden=hidden))
    score = jax.jit(lambda x: packed.summed(PACKING, lambda part: reward(CRITIC, part), x))
    counts = []
    for shortened in (rollout, rollout.replace(mask=rollout.mask & (jnp.arange(P + R) < P + 1)[None])):
        ran.clear()
        jax.block_until_ready(score(shortened))
        jax.effects_barrier()
        rows = packed_rows(np.asarray(shortened.mask.sum(1)), WIDTH)
        assert len(ran) == -(-rows // PACKING.rows)
        counts.append(len(ran))
    assert counts[1] < counts[0] < B // PACKING.rows
    assert score._cache_size() == 1


def test_a_part_has_at_most_the_tokens_of_a_micro_batch_and_a_row_for_every_device():
    run = dataclasses.replace(the_run("ppo", packing=True), batch_size=64)  # micro-batches of 8 sequences of 16 tokens
    shapes = [programs.packed_shape("ppo", run, P + R, ways) for ways in (1, 2, 4, 8)]
    assert shapes == [(5, 24), (4, 24), (4, 24), (8, 16)]
    assert programs.packed_shape("ppo", run, 40, 1) == (8, 40)  # longer sequences make longer rows
    assert programs.packed_shape("ppo", dataclasses.replace(run, score_parts=16), 40, 1) == (4, 40)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"micro_batches": 1}, ["ppo.micro_batches is 1", "nothing could be left out", "a divisor of the 8 answers"]),
        ({"micro_batches": 4, "compat": "deepspeed_chat"}, ["ppo.compat is deepspeed_chat", "choose one of the two"]),
    ],
)
def test_packing_that_would_do_nothing_or_change_the_loss_is_refused(keys: dict, words: list[str]):
    run = the_run("ppo", packing=True)
    run = dataclasses.replace(run, ppo=config.PPO(minibatches=2, **keys))
    problems = [problem.text for problem in checks.find_problems(run)]
    assert any(all(word in text for word in words) for text in problems), problems
