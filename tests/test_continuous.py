"""Continuous batching answers what the plain sampler answers, in fewer steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import build, config, continuous, hlo, models, parallel, programs, sampling, testing
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


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = SMALL | {"model_type": "llama", "intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = LLAMA | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 4}
DECODERS = {
    "grouped heads": LLAMA,
    "windows, caps": GEMMA,
    "linear position bias": SMALL | {"model_type": "bloom", "n_layer": 1, "n_head": 4},
}


@pytest.mark.parametrize("name", DECODERS)
def test_the_same_answers_from_the_real_decoder(name: str):
    """5 + 9 slots in a ring: rows refilled late have wrapped around it."""
    model = models.make_model(models.spec_of(DECODERS[name]))
    params = model.init(jax.random.key(1))
    params |= {"embed": jax.tree.map(lambda leaf: 20 * leaf, params["embed"])}
    one, other, steps, _ = both(model, params, testing.random_prompts(1, 11, 5, 64), rows=4, refill=2, samples=2)
    assert steps > 5 + 9
    assert one.tokens[:, 5:].std() > 5  # the answers are no constants
    assert_same(one, other)


@pytest.mark.skipif(jax.device_count() < 8, reason="one simulated device: nothing to compare")
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_every_shard_of_the_batch_answers_its_own_prompts(shape: tuple[int, int, int]):
    mesh = parallel.make_mesh(config.Mesh(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    settings = config.Model(scratch=testing.tiny_scratch())
    model = build.make_model(settings, models.scratch_spec(testing.tiny_scratch(), 64), mesh)
    params = model.init(jax.random.key(1))
    params |= {"embed": jax.tree.map(lambda leaf: 20 * leaf, params["embed"])}
    prompts = testing.random_prompts(1, 16, 5, 64)
    alone = models.make_model(models.scratch_spec(testing.tiny_scratch(), 64))
    plain = functools.partial(sampling.generate, alone, config.Sampling(max_new_tokens=9), samples=2, **STOPS)
    one, _ = jax.jit(plain)(params, prompts, jax.random.key(5))
    decoding = alone.for_decoding(params)
    where = parallel.param_shardings(mesh, model.axes(decoding), decoding, gather=("fsdp",))
    rows = parallel.batch_sharding(mesh)
    sample = programs.make_rollout(model, mesh, config.Sampling(max_new_tokens=9, rows=16), samples=2, **STOPS)
    step = jax.jit(sample, out_shardings=rows)
    args = parallel.place(decoding, where), parallel.place(prompts, rows), jax.random.key(5)
    assert_same(one, step(*args))
    found = hlo.report(step.lower(*args).compile().as_text()).collectives
    assert set(found) <= ({"all-reduce", "all-gather"} if shape[2] > 1 else set())  # a shard of the batch waits for no other


@pytest.mark.parametrize(("rows", "refill"), [(6, 2), (5, 2), (20, 3), (4, 4)])
def test_the_longest_case_is_that_of_answers_none_of_which_ends_early(rows: int, refill: int):
    prompts = testing.random_prompts(0, 13, 4, V)
    *_, steps, prefills = both(MODEL, PARAMS, prompts, rows=rows, refill=refill, min_new_tokens=9)
    assert (prefills, steps) == (lambda found: (found[0], 8 * found[1]))(continuous.longest_case(13, rows, refill))


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
