"""The models with known answers keep their promises; the tokenizer and the random batches are what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, testing

V = 6


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_model_equals_the_recurrence_with_and_without_cache(decay: float):
    model = testing.markov_model(V, decay=decay)
    params = model.init(jax.random.key(0))
    rollout = testing.random_rollout(0, 5, 4, 3, V)
    logits = testing.history_logits(params, rollout.tokens, rollout.mask, decay=decay)
    hidden = jax.jit(model.hidden)(params, rollout.tokens, rollout.mask)
    at = np.asarray(rollout.mask)
    np.testing.assert_allclose(np.asarray(model.logits(params, hidden))[at], logits[at], atol=1e-5)
    scores = testing.history_scores(params, rollout.tokens, rollout.mask, decay=decay)
    np.testing.assert_allclose(np.asarray(model.score(params, hidden))[at], scores[at], atol=1e-5)
    first, cache = jax.jit(model.prefill, static_argnums=3)(params, rollout.tokens[:, :4], rollout.mask[:, :4], 7)
    np.testing.assert_allclose(first, hidden[:, :4], atol=1e-5)
    valid = rollout.mask & (jnp.arange(7)[None] <= 4)
    position = rollout.mask[:, :4].sum(1)
    second, _ = jax.jit(model.decode)(params, cache, rollout.tokens[:, 4], position, jnp.int32(4), valid)
    np.testing.assert_allclose(second, hidden[:, 4], atol=1e-5)


def test_decay_0_is_a_markov_chain():
    model = testing.markov_model(V)
    params = model.init(jax.random.key(1))
    rollout = testing.random_rollout(1, 4, 3, 3, V)
    hidden = jax.jit(model.hidden)(params, rollout.tokens, rollout.mask)
    at = np.asarray(rollout.mask)
    np.testing.assert_array_equal(np.asarray(model.logits(params, hidden))[at], np.asarray(params["table"])[rollout.tokens][at])


def test_packed_segments_do_not_see_one_another():
    model = testing.markov_model(V, decay=0.9)
    params = model.init(jax.random.key(2))
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0]])
    packed = model.hidden(params, tokens, segments > 0, positions=positions, segments=segments)
    apart = model.hidden(params, tokens[:, 3:5], jnp.ones((1, 2), bool))
    np.testing.assert_allclose(packed[:, 3:5], apart, atol=1e-6)


def test_byte_tokenizer_keeps_every_text(tmp_path):
    tokenizer = testing.byte_tokenizer()
    for text in ("plain", "  two  spaces\n\ttab ", "naïve – 日本語 🙂", "".join(map(chr, range(128)))):
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert tokenizer("a<eos>").input_ids == [97, 258]
    assert tokenizer.decode([97, 258], skip_special_tokens=True) == "a"
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded("é<pad>").input_ids == [0xC3, 0xA9, 256]


def test_random_batches_are_consistent():
    prompts = testing.random_prompts(0, 6, 5, V, shortest=2, pad_id=3)
    lengths = np.asarray(prompts.mask.sum(1))
    assert lengths.max() == 5
    assert lengths.min() >= 2
    np.testing.assert_array_equal(prompts.mask, np.arange(5)[None] >= 5 - lengths[:, None])
    assert (np.asarray(prompts.tokens)[~np.asarray(prompts.mask)] == 3).all()
    experience = testing.random_experience(0, 6, 5, 4, V)
    assert experience.tokens.shape == (6, 9)
    np.testing.assert_array_equal(experience.mask[:, 5:], experience.action_mask)
    np.testing.assert_allclose(experience.returns, experience.values + experience.advantages, atol=1e-6)
    pairs = testing.random_preferences(0, 6, 7, V)
    assert not np.asarray(pairs.chosen.target_mask[:, 0]).any()
    assert (np.asarray(pairs.chosen.target_mask) <= np.asarray(pairs.chosen.mask)).all()
    assert (np.asarray(pairs.chosen.tokens) != np.asarray(pairs.rejected.tokens)).any()
    again = testing.random_rollout(5, 6, 5, 4, V)
    np.testing.assert_array_equal(again.tokens, testing.random_rollout(5, 6, 5, 4, V).tokens)
    assert (np.asarray(again.logprobs)[~np.asarray(again.action_mask)] == 0).all()


def test_check_model_passes_what_keeps_the_promises():
    testing.check_model(_one_function())


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        ({"hidden": lambda x, mask: x * jnp.arange(1, x.shape[1] + 1)[None, :, None]}, "the width of the padding"),
        ({"hidden": lambda x, mask: jnp.cumsum(x, 1)}, "what stands in the padding"),
        ({"hidden": lambda x, mask: jnp.where(mask[..., None], x, 0).sum(1, keepdims=True) + x}, "a later token"),
        ({"decode": 1.0}, "reading token by token"),
        ({"hidden": lambda x, mask: x * jnp.nan}, "logits by nan"),
        ({"dtype": jnp.bfloat16}, "logits are bfloat16; they must be float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_model_names_what_is_broken(break_it, named):
    with pytest.raises(ValueError, match=named):
        testing.check_model(_one_function(**break_it))


def _one_function(hidden=None, decode=0.0, dtype=jnp.float32):
    """`models.without_cache` of a masked running sum of embeddings, or of something wrong."""
    good = lambda x, mask: jnp.cumsum(jnp.where(mask[..., None], x, 0.0), 1)  # noqa: E731
    model = models.without_cache(
        lambda params, tokens, mask: (hidden or good)(params[tokens], mask),
        vocab_size=V,
        init=lambda key, *, head="lm": jax.random.normal(key, (V, V)),
        logits=lambda params, states: (states @ params).astype(dtype),
        score=lambda params, states: states.sum(-1),
    )
    return dataclasses.replace(model, decode=lambda *args: (lambda h, c: (h + decode, c))(*model.decode(*args)))
