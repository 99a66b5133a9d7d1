"""The decode loop: exact distributions on a model known in closed form, the real decoder, invariances, edges."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config, models, ops, parallel, sampling, testing
from rlhf_jax.errors import UserError
from rlhf_jax.types import Model, Prompts, Rollout

V, DECAY = 7, 0.6
MODEL = testing.markov_model(V, decay=DECAY)
SPEC = models.scratch_spec(dataclasses.replace(testing.tiny_scratch(), layers=1), 64)
FIELDS = [field.name for field in dataclasses.fields(Rollout)]


@functools.cache
def known() -> dict:
    return MODEL.init(jax.random.key(0))


@functools.cache
def decoder() -> tuple:
    """The real decoder, one layer, 64 tokens; its logits are scaled up so that no two tokens are nearly equal."""
    model = models.make_model(SPEC)
    params = model.init(jax.random.key(1))
    return model, params | {"embed": jax.tree.map(lambda leaf: 20 * leaf, params["embed"])}


@functools.cache
def compiled(model: Model, how: config.Sampling, stop_ids: tuple[int, ...], pad_id: int, samples: int) -> Callable:
    def answer(params, prompts, key):
        return sampling.generate(model, how, params, prompts, key, stop_ids=stop_ids, pad_id=pad_id, samples=samples)

    return jax.jit(answer)


def run(
    model, params, prompts, *, seed: int = 3, stop_ids=(1, 2), pad_id: int = 0, samples: int = 1, **keys
) -> tuple[Rollout, int]:
    """Rollout and decoding steps."""
    how = config.Sampling(**{"max_new_tokens": 9} | keys)
    rollout, steps = compiled(model, how, stop_ids, pad_id, samples)(params, prompts, jax.random.key(seed))
    return jax.tree.map(np.asarray, rollout), int(steps)


def assert_same(one: Rollout, other: Rollout) -> None:
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        if name == "logprobs":
            np.testing.assert_allclose(a, b, atol=2e-5)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


def rows_of(tree, rows):
    return jax.tree.map(lambda leaf: leaf[rows], tree)


# ---------------------------------------------------------------------------------------------------- distribution


def test_two_tokens_follow_the_known_distribution():
    """Joint counts of the first two tokens over 6 000 rows: Pearson's statistic below its 99.9 % quantile."""
    rows = 6000
    prompts = Prompts(
        tokens=jnp.broadcast_to(jnp.asarray([[0, 3, 5]], jnp.int32), (rows, 3)),
        mask=jnp.broadcast_to(jnp.asarray([[False, True, True]]), (rows, 3)),
        index=jnp.arange(rows, dtype=jnp.int32),
    )
    rollout, _ = run(MODEL, known(), prompts, max_new_tokens=2, stop_ids=(), temperature=1.7)
    pairs = np.stack(np.meshgrid(np.arange(V), np.arange(V), indexing="ij"), -1).reshape(-1, 2)
    tokens = np.concatenate([np.broadcast_to([[3, 5]], (V * V, 2)), pairs], 1)
    logits = testing.history_logits(known(), tokens, np.ones_like(tokens, bool), decay=DECAY) / 1.7
    logprobs = testing.log_softmax(logits)[:, 1:3]
    expected = rows * np.exp(np.take_along_axis(logprobs, pairs[..., None], 2)[..., 0].sum(1))
    counts = np.bincount(rollout.tokens[:, 3] * V + rollout.tokens[:, 4], minlength=V * V)
    freedom = V * V - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom * (
        1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5
    ) ** 3


@pytest.mark.parametrize(
    "keys",
    [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 4, "top_p": 0.9, "min_p": 0.02}, {"min_new_tokens": 4}],
    ids=["plain", "temperature", "filters", "minimum"],
)
def test_logprobs_are_those_of_the_distribution_that_was_sampled(keys: dict):
    prompts = testing.random_prompts(1, 8, 5, V, shortest=0)
    rollout, _ = run(MODEL, known(), prompts, **keys)
    logits = testing.history_logits(known(), rollout.tokens, rollout.mask, decay=DECAY)[:, 4:-1] / keys.get("temperature", 1.0)
    if rollout.kept is not None:
        logits = np.where(
            np.asarray(ops.unpack_kept(jnp.asarray(rollout.kept), V)) | ~rollout.action_mask[..., None], logits, -np.inf
        )
    want = np.take_along_axis(testing.log_softmax(logits), rollout.tokens[:, 5:, None], 2)[..., 0]
    np.testing.assert_allclose(rollout.logprobs, np.where(rollout.action_mask, want, 0.0), atol=3e-6)
    assert (rollout.kept is None) == (keys in ({}, {"temperature": 0.7}))


# --------------------------------------------------------------------------------------------------- what comes out


def test_masks_stop_tokens_and_padding():
    prompts = testing.random_prompts(2, 40, 5, V)
    rollout, _ = run(MODEL, known(), prompts, pad_id=1)  # the padding token is also a stop token, as with GPT-2
    answers = rollout.tokens[:, 5:]
    length = rollout.action_mask.sum(1)
    place = np.arange(9)[None]
    np.testing.assert_array_equal(rollout.action_mask, place < length[:, None])
    np.testing.assert_array_equal(rollout.mask, np.concatenate([prompts.mask, rollout.action_mask], 1))
    np.testing.assert_array_equal(rollout.tokens[:, :5], prompts.tokens)
    stops = np.isin(answers, (1, 2))
    assert rollout.finished.any()
    assert not rollout.finished.all()
    assert (length[rollout.finished] < 9).any()
    last = np.take_along_axis(stops, length[:, None] - 1, 1)[:, 0]
    np.testing.assert_array_equal(last, rollout.finished)
    assert not (stops & (place < length[:, None] - 1)).any()
    np.testing.assert_array_equal(length[~rollout.finished], 9)
    np.testing.assert_array_equal(answers[~rollout.action_mask], 1)
    np.testing.assert_array_equal(rollout.logprobs[~rollout.action_mask], 0.0)
    assert (rollout.logprobs[rollout.action_mask] < 0).all()
    np.testing.assert_array_equal(rollout.index, prompts.index)


def test_minimum_and_maximum_length():
    prompts = testing.random_prompts(3, 30, 4, V)
    short, _ = run(MODEL, known(), prompts, min_new_tokens=3, stop_ids=(0, 1, 2, 3))
    assert set(short.action_mask.sum(1)) >= {4, 5}
    assert short.action_mask.sum(1).min() == 4  # three tokens that do not stop, then one that may
    one, steps = run(MODEL, known(), prompts, max_new_tokens=1)
    assert one.tokens.shape == (30, 5)
    assert steps == 0


def test_the_loop_stops_with_the_last_row():
    sure = jnp.full((V, V), -40.0).at[jnp.arange(V), (jnp.arange(V) + 1) % V].set(40.0)  # token v is followed by v + 1
    params = {"table": sure, "scores": jnp.zeros(V)}
    prompts = Prompts(tokens=jnp.asarray([[4], [5], [3]]), mask=jnp.ones((3, 1), bool), index=jnp.arange(3))
    rollout, steps = run(testing.markov_model(V), params, prompts, stop_ids=(6,), max_new_tokens=50)
    np.testing.assert_array_equal(rollout.tokens[:, 1:5], [[5, 6, 0, 0], [6, 0, 0, 0], [4, 5, 6, 0]])
    assert steps == 2  # the first token needs no decoding; a batch that never stops takes R - 1
    assert run(testing.markov_model(V), params, prompts, stop_ids=(), max_new_tokens=50)[1] == 49


def test_empty_prompt_starts_from_the_padding_token():
    model, params = decoder()
    prompts = testing.random_prompts(4, 3, 4, 64)
    prompts = prompts.replace(mask=prompts.mask.at[1].set(False))
    rollout, _ = run(model, params, prompts, stop_ids=())
    assert rollout.mask[1].tolist() == [False] * 3 + [True] * 10
    assert np.isfinite(rollout.logprobs).all()
    assert rollout.action_mask.all()
    assert not rollout.finished.any()


# ------------------------------------------------------------------------------------------------- the real decoder


def test_greedy_equals_the_argmax_roll_out_without_a_cache():
    model, params = decoder()
    prompts = testing.random_prompts(5, 4, 6, 64)
    rollout, _ = run(model, params, prompts, temperature=0.0, stop_ids=())
    hidden = jax.jit(model.hidden)
    tokens, mask = prompts.tokens, prompts.mask
    for _ in range(9):
        pad = ((0, 0), (0, 15 - tokens.shape[1]))
        states = hidden(params, jnp.pad(tokens, pad), jnp.pad(mask, pad))[:, tokens.shape[1] - 1]
        best = jnp.argmax(model.logits(params, states), -1).astype(jnp.int32)
        tokens = jnp.concatenate([tokens, best[:, None]], 1)
        mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    np.testing.assert_array_equal(rollout.tokens, tokens)


def test_repetition_penalty_ignores_left_padding():
    """Greedy, against a loop over rows; the padding token is one that the model likes."""
    model, params = decoder()
    prompts = testing.random_prompts(6, 4, 6, 64)
    free, _ = run(model, params, prompts, temperature=0.0, stop_ids=())
    said = [np.setdiff1d(row[6:], row[:6]) for row in free.tokens]
    liked = jnp.asarray([[new[0] if len(new) else 0] for new in said])  # what a row says and its prompt does not hold
    assert any(len(new) and not bool(row[0]) for new, row in zip(said, prompts.mask, strict=True))
    prompts = prompts.replace(tokens=jnp.where(prompts.mask, prompts.tokens, liked))
    rollout, _ = run(model, params, prompts, temperature=0.0, stop_ids=(), repetition_penalty=1.4)
    states = model.hidden(params, jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask))
    logits = np.array(model.logits(params, states), np.float64)
    for row in range(4):
        for t in range(6, 15):
            seen = np.unique(rollout.tokens[row, :t][rollout.mask[row, :t]])
            scores = logits[row, t - 1]
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * 1.4, scores[seen] / 1.4)
            assert rollout.tokens[row, t] == scores.argmax()


# ------------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("kind", ["real decoder", "filters"])
def test_a_row_depends_on_its_own_prompt_alone(kind: str):
    """Order of the batch, other rows, width of the padding: the same tokens."""
    model, params = decoder() if kind == "real decoder" else (MODEL, known())
    keys = {} if kind == "real decoder" else {"top_p": 0.8, "min_new_tokens": 2}
    prompts = testing.random_prompts(7, 8, 5, model.vocab_size)
    whole, _ = run(model, params, prompts, **keys)
    order = np.random.default_rng(0).permutation(8)
    permuted, _ = run(model, params, rows_of(prompts, order), **keys)
    assert_same(permuted, rows_of(whole, order))
    part, _ = run(model, params, rows_of(prompts, slice(2, 5)), **keys)
    assert_same(part, rows_of(whole, slice(2, 5)))
    wide = prompts.replace(
        tokens=jnp.pad(prompts.tokens, ((0, 0), (4, 0)), constant_values=3), mask=jnp.pad(prompts.mask, ((0, 0), (4, 0)))
    )
    padded, _ = run(model, params, wide, **keys)
    assert_same(padded.replace(tokens=padded.tokens[:, 4:], mask=padded.mask[:, 4:]), whole)


@pytest.mark.parametrize(
    ("shape", "keys"),
    [(config.Mesh(data=8, fsdp=1), {}), (config.Mesh(data=2, fsdp=2, tensor=2), {"top_k": 20, "top_p": 0.8})],
    ids=["8x1x1", "2x2x2-filters"],
)
def test_the_same_tokens_on_every_mesh(shape: config.Mesh, keys: dict):
    model, params = decoder()
    prompts = testing.random_prompts(8, 8, 5, 64)
    alone, _ = run(model, params, prompts, **keys)
    mesh = parallel.make_mesh(shape)
    pinned = models.make_model(SPEC, constrain=parallel.make_constrain(mesh))
    placed = jax.device_put(params, parallel.param_shardings(mesh, model.axes(params), params))
    spread = jax.device_put(prompts, parallel.batch_sharding(mesh))
    assert_same(run(pinned, placed, spread, **keys)[0], alone)


def test_samples_differ_between_keys_prompts_and_numbers_alone():
    prompts = testing.random_prompts(9, 1, 4, V)
    prompts = jax.tree.map(lambda leaf: jnp.repeat(leaf, 6, 0), prompts)
    same, _ = run(MODEL, known(), prompts)
    assert (same.tokens == same.tokens[:1]).all()
    by_index, _ = run(MODEL, known(), prompts.replace(index=jnp.arange(6)))
    by_number, _ = run(MODEL, known(), prompts.replace(sample=jnp.arange(6)))
    for rollout in (by_index, by_number):
        assert len(np.unique(rollout.tokens, axis=0)) > 3
    other, _ = run(MODEL, known(), prompts, seed=4)
    assert (other.tokens != same.tokens).any()


def test_group_is_prefilled_once_and_equals_repeated_prompts():
    prompts = testing.random_prompts(10, 4, 5, 64)
    model, params = decoder()
    shared, _ = run(model, params, prompts, samples=3)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, 0), prompts).replace(sample=jnp.arange(12) % 3)
    assert_same(shared, run(model, params, repeated)[0])
    seen = []
    spy = dataclasses.replace(model, prefill=lambda *args: seen.append(args[1].shape[0]) or model.prefill(*args))
    run(spy, params, prompts, samples=3)
    assert max(seen[:1]) == 4
    numbered = prompts.replace(sample=jnp.asarray([0, 3, 0, 6]))  # of a batch that holds prompts before
    later = repeated.replace(sample=jnp.repeat(numbered.sample, 3) + repeated.sample)
    assert_same(run(model, params, numbered, samples=3)[0], run(model, params, later)[0])


def test_one_program_for_each_shape():
    compiled = []
    sample = sampling.make_sampler(MODEL, config.Sampling(max_new_tokens=4), stop_ids=(1,), pad_id=0)
    step = jax.jit(lambda *args: compiled.append(1) or sample(*args))
    for seed in range(3):
        step(known(), testing.random_prompts(seed, 4, 5, V), jax.random.key(seed))
    assert len(compiled) == 1
    step(known(), testing.random_prompts(0, 4, 6, V), jax.random.key(0))
    assert len(compiled) == 2


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens is 0"),
        ({"min_new_tokens": 65}, "sampling.min_new_tokens is 65"),
        ({"temperature": -1.0}, "sampling.temperature is -1.0"),
        ({"temperature": 1e-10}, r"sampling.temperature is 1e-10; it must be 0 \(greedy\) or at least 0.0001"),
        ({"top_k": -1}, "sampling.top_k is -1"),
        ({"top_p": 1.5}, "sampling.top_p is 1.5"),
        ({"min_p": -0.1}, "sampling.min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty is 0.0"),
    ],
)
def test_keys_that_make_no_sense_are_named(keys: dict, words: str):
    with pytest.raises(UserError, match=words):
        sampling.make_sampler(MODEL, config.Sampling(**keys), stop_ids=(), pad_id=0)


def test_tokens_outside_the_vocabulary_and_prompts_without_a_column():
    for stop_ids, pad_id, words in (((1, V), 0, f"stop token {V} is outside"), ((), -1, "pad token -1 is outside")):
        with pytest.raises(UserError, match=words):
            sampling.make_sampler(MODEL, config.Sampling(), stop_ids=stop_ids, pad_id=pad_id)
    nothing = Prompts(tokens=jnp.zeros((2, 0), jnp.int32), mask=jnp.zeros((2, 0), bool), index=jnp.arange(2))
    with pytest.raises(UserError, match="width 0"):
        run(MODEL, known(), nothing)
