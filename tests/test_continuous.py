"""Continuous batching answers what the plain sampler answers, in fewer steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config, continuous, sampling, testing
from rlhf_jax.errors import UserError
from rlhf_jax.types import Prompts, Rollout

V, DECAY = 7, 0.6
MODEL = testing.markov_model(V, decay=DECAY)  # depends on every token before and its distance: a wrong slot shows
PARAMS = MODEL.init(jax.random.key(0))
STOPS = {"stop_ids": (1, 2), "pad_id": 0}


def both(
    model, params, prompts: Prompts, *, rows: int, refill: int, samples: int = 1, **keys
) -> tuple[Rollout, Rollout, int, int]:
    """Plain rollout, continuous rollout, its decoding steps and prefills."""
    how = config.Sampling(**{"max_new_tokens": 9} | keys)
    plain = functools.partial(sampling.generate, model, how, samples=samples, **STOPS)
    refilled = functools.partial(continuous.generate, model, how, rows=rows, refill=refill, samples=samples, **STOPS)
    one, _ = jax.jit(plain)(params, prompts, jax.random.key(5))
    other, steps, refills = jax.jit(refilled)(params, prompts, jax.random.key(5))
    return one, other, int(steps), int(refills)


def assert_same(one: Rollout, other: Rollout) -> None:
    for field in dataclasses.fields(Rollout):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "logprobs":
            np.testing.assert_allclose(a, b, atol=2e-5)
        else:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize(
    ("keys", "rows", "refill", "samples"),
    [
        ({}, 6, 2, 1),
        ({"top_p": 0.8, "min_new_tokens": 2, "temperature": 1.3}, 5, 5, 1),
        ({"repetition_penalty": 1.5}, 6, 4, 2),
        ({"temperature": 0.0}, 20, 3, 1),
    ],
    ids=["rows of 2", "filters, all rows at once", "groups, penalty", "more rows than prompts"],
)
def test_the_same_answers_token_for_token(keys: dict, rows: int, refill: int, samples: int):
    prompts = testing.random_prompts(0, 13, 4, V, shortest=0)  # 13 is a multiple of nothing
    one, other, _, refills = both(MODEL, PARAMS, prompts, rows=rows, refill=refill, samples=samples, **keys)
    assert_same(one, other)
    assert refills == -(-13 * samples // refill)
    assert one.tokens.shape[0] == 13 * samples


def test_one_token_each():
    one, other, steps, _ = both(MODEL, PARAMS, testing.random_prompts(2, 5, 3, V), rows=2, refill=1, max_new_tokens=1)
    assert_same(one, other)
    assert steps == 0


def test_a_few_long_answers_do_not_hold_up_the_others():
    """Chains v -> v - 1 that end at 0: a prompt of token n has an answer of n tokens. 3 rows, 60 short and 2 long answers."""
    size = 32
    sure = jnp.full((size, size), -40.0).at[jnp.arange(size), jnp.maximum(jnp.arange(size) - 1, 0)].set(40.0)
    model = testing.markov_model(size)
    lengths = np.asarray([30, 1, 2] + [3, 1] * 28 + [31, 2, 1])
    prompts = Prompts(tokens=jnp.asarray(lengths)[:, None], mask=jnp.ones((62, 1), bool), index=jnp.arange(62))
    params = {"table": sure, "scores": jnp.zeros(size)}
    run = functools.partial(
        continuous.generate, model, config.Sampling(max_new_tokens=40), stop_ids=(0,), pad_id=5, rows=3, refill=1
    )
    rollout, steps, _ = jax.jit(run)(params, prompts, jax.random.key(0))
    np.testing.assert_array_equal(rollout.action_mask.sum(1), lengths)
    assert bool(rollout.finished.all())
    in_batches = sum(max(lengths[at : at + 3]) - 1 for at in range(0, 62, 3))
    assert int(steps) < 0.75 * in_batches


def test_numbers_that_do_not_fit_are_refused():
    make = functools.partial(continuous.make_continuous_sampler, MODEL, config.Sampling(), **STOPS)
    for keys in ({"rows": 4, "refill": 5}, {"rows": 4, "refill": 3, "samples": 2}, {"rows": 2, "samples": 4}):
        with pytest.raises(UserError, match=r"refill is \d; it must be a multiple of samples"):
            make(**keys)
    assert callable(make(rows=8))
