"""A task with a known answer for every algorithm: a table of logits must learn p -> p + 3 -> end-of-sequence.

Prompts are one token, 0 to 2; the right answer to p is the token p + 3 and then end-of-sequence (6); 7 is padding. The model is
`testing.markov_model`, so the probability of the right answer is known exactly: softmax(table[p])[p+3] softmax(table[p+3])[6].
The whole run is one pure function, so seeds are a `map`.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import config, functional, testing
from rlhf_jax.algorithms.training import Algorithm
from rlhf_jax.types import Frozen, Preferences, Prompts, Rollout, RunState, Sequences

VOCAB, EOS, PAD, R = 8, 6, 7, 3
MODEL = testing.markov_model(VOCAB)
SAMPLING = config.Sampling(max_new_tokens=R)


def right_probability(params: dict[str, jax.Array]) -> jax.Array:
    """Mean over prompts of the probability of the right answer, f32[]."""
    p = jax.nn.softmax(params["table"], -1)
    prompts = jnp.arange(3)
    return jnp.mean(p[prompts, prompts + 3] * p[prompts + 3, EOS])


def score(rollout: Rollout) -> jax.Array:
    """0.7 for the right first token, 0.6 more for the end-of-sequence right after it: f32[B], reward units."""
    first, second = rollout.tokens[:, -R], rollout.tokens[:, -R + 1]
    right = first == rollout.tokens[:, 0] + 3
    return 0.7 * right + 0.6 * (right & (second == EOS))


def online(algorithm: Algorithm, *, steps: int = 80, answers: int = 48, learning_rate: float = 0.15, kl_coef: float = 0.0):
    """seed key -> (probability of the right answer before, after, metrics of every step); pure, to be jitted and mapped."""
    run = functional.online(
        algorithm,
        MODEL,
        SAMPLING,
        stop_ids=(EOS,),
        pad_id=PAD,
        actor_tx=optax.adam(learning_rate),
        critic_tx=optax.adam(learning_rate),
    )
    count = answers // algorithm.group_size
    prompts = Prompts(
        tokens=(jnp.arange(count, dtype=jnp.int32) % 3)[:, None],
        mask=jnp.ones((count, 1), bool),
        index=jnp.arange(count, dtype=jnp.int32),
    )

    def learn(key: jax.Array):
        params = jax.tree.map(lambda x: 0.3 * x, MODEL.init(jax.random.fold_in(key, 0)))
        frozen = Frozen(reference=params)
        value = jax.tree.map(jnp.zeros_like, params) if "critic" in algorithm.needs else None
        state = run.init(params, critic=value, kl_coef=kl_coef)

        def step(state: RunState, now: jax.Array):
            rollout = run.sample(state, frozen, prompts, now)
            greedy = score(run.greedy(state, frozen, prompts, now)) if "greedy" in algorithm.needs else None
            return run.learn(state, frozen, rollout, score(rollout), now, greedy_scores=greedy)

        state, metrics = jax.lax.scan(step, state, jax.random.split(jax.random.fold_in(key, 1), steps))
        return right_probability(params), right_probability(state.actor.params), metrics

    return learn


def seeds(learn, number: int = 3):
    """Run every seed in one program, one after the other: that compiles faster than a `vmap`, which would do as well."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(number))
    return jax.jit(lambda keys: jax.lax.map(learn, keys))(keys)


def pairs(count: int = 12) -> Preferences:
    """Right answers against wrong ones (a wrong first token, or no end-of-sequence), right-padded: [prompt, answer, end]."""
    prompt = jnp.arange(count, dtype=jnp.int32) % 3
    ending = jnp.where(jnp.arange(count) % 2 == 0, EOS, prompt)
    other = jnp.where(jnp.arange(count) % 2 == 0, (prompt + 1) % 3 + 3, prompt + 3)

    def rows(first, second):
        tokens = jnp.stack([prompt, first, second], 1).astype(jnp.int32)
        mask = jnp.ones(tokens.shape, bool)
        return Sequences(tokens=tokens, mask=mask, target_mask=mask & (jnp.arange(3) > 0)[None])

    return Preferences(chosen=rows(prompt + 3, jnp.full(count, EOS)), rejected=rows(other, ending))
