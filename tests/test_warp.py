"""Filters and the draw of a token, against float64 definitions and against the distribution itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rlhf_jax import config, testing, warp

KEYS = {"t": "temperature", "k": "top_k", "p": "top_p", "minp": "min_p", "rep": "repetition_penalty"}


def sampling_of(output: str) -> config.Sampling:
    """`t0.7_k10_p0.9` -> Sampling(temperature=0.7, top_k=10, top_p=0.9)."""
    found = {}
    for part in output.split("_"):
        name, value = re.fullmatch(r"([a-z]+)([\d.e-]+)", part).groups()
        found[KEYS[name]] = int(value) if name == "k" else float(value)
    return config.Sampling(**found)


@pytest.mark.parametrize("name", oracles.names("sampling"))
def test_kept_sets_and_logprobs_of_every_filter(name: str):
    case = oracles.load("sampling")[name]
    outputs = [key.removeprefix("kept_") for key in case.ref if key.startswith("kept_")]
    assert outputs

    @jax.jit
    def processed(logits: jax.Array, seen: jax.Array) -> list[jax.Array]:
        how = [sampling_of(output) for output in outputs]
        penalised = [warp.penalize_repetition(logits, seen, s.repetition_penalty) for s in how]
        return [warp.filtered(scores, s) for scores, s in zip(penalised, how, strict=True)]

    seen = np.zeros(case.inputs["logits"].shape, bool)
    if "input_ids" in case.inputs:
        np.put_along_axis(seen, case.inputs["input_ids"], True, axis=1)
    for output, scores in zip(outputs, processed(case.inputs["logits"], seen), strict=True):
        kept = case.ref[f"kept_{output}"]
        np.testing.assert_array_equal(scores > -jnp.inf, kept, err_msg=output)
        oracles.close(testing.log_softmax(scores), case.ref[f"logprobs_{output}"], where=kept, what=output)


def test_top_k_keeps_ties_and_every_token_where_k_exceeds_the_vocabulary():
    logits = jnp.asarray([[0.0, -0.0, 1.0, -1.0, -jnp.inf]])
    np.testing.assert_array_equal(warp.keep_top_k(logits, 2), [[True, True, True, False, False]])  # 0 and -0 are one number
    assert bool(warp.keep_top_k(logits, 99).all())


def test_top_p_keeps_one_token_at_least_and_the_lowest_ids_of_ties():
    logits = jnp.log(jnp.asarray([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]]))
    kept = {p: np.asarray(warp.keep_top_p(logits, p)).astype(int).tolist() for p in (0.0, 0.5, 0.6, 0.85)}
    assert kept[0.0] == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert kept[0.5] == [[1, 1, 0, 0], [0, 1, 0, 1]]
    assert kept[0.6] == [[1, 1, 1, 0], [0, 1, 0, 1]]
    assert kept[0.85] == [[1, 1, 1, 1], [1, 1, 0, 1]]


@pytest.mark.parametrize("vocab_size", [3, 11, 64, 300, 1009])
def test_draw_follows_the_softmax(vocab_size: int):
    """Pearson's statistic over 20 000 draws stays below its 99.9 % quantile; prime sizes pad the blocks."""
    draws = 20_000
    logits = np.random.default_rng(vocab_size).normal(size=vocab_size) * 2
    logits[1] = -np.inf
    keys = jax.random.split(jax.random.key(vocab_size), draws)
    token, logprob = jax.jit(warp.draw)(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, vocab_size)), keys)
    want = testing.log_softmax(logits)
    np.testing.assert_allclose(logprob, want[token], rtol=2e-6, atol=2e-6)
    counts = np.bincount(token, minlength=vocab_size)
    expected = draws * np.exp(want)
    assert counts[1] == 0
    common = expected >= 5  # rare tokens are pooled
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = len(counts) - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty


def test_draw_without_keys_takes_the_likeliest_token():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(40, 50)), jnp.float32)
    token, logprob = warp.draw(logits, None)
    np.testing.assert_array_equal(token, np.argmax(logits, -1))
    np.testing.assert_allclose(logprob, testing.log_softmax(logits).max(-1), rtol=2e-6)


def test_blocks_divide_real_vocabularies_in_powers_of_two():
    for vocab_size, blocks in ((8192, 64), (32000, 128), (128256, 256), (151936, 128), (50304, 128)):
        assert warp.block_count(vocab_size) == blocks
        assert vocab_size % blocks == 0
    assert all(1 <= warp.block_count(size) <= size for size in range(1, 400))
