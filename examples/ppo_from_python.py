"""PPO in twenty lines: your own model function, your own reward, no files and no command line.

    python examples/ppo_from_python.py           seconds on two cores

The model is one attention layer over digits; the reward is 1 for every digit that is larger than the one before, -1 for one
that is not, and 1 for an answer that ends: 5 at best.
"""

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import config, functional, models
from rlhf_jax.algorithms import ppo
from rlhf_jax.types import Frozen, Prompts, Rollout

EOS, PAD, VOCAB, WIDTH, ANSWER = 10, 11, 12, 32, 6  # tokens 0 to 9 are digits


def init(key, *, head="lm"):
    shapes = {"embed": (VOCAB, WIDTH), "attend": (WIDTH, WIDTH), "mix": (2 * WIDTH, WIDTH), "value": (WIDTH,)}
    return {name: jax.random.normal(jax.random.fold_in(key, n), shape) / 8 for n, (name, shape) in enumerate(shapes.items())}


def hidden(params, tokens, mask):
    x = params["embed"][tokens]
    seen = mask[:, None, :] & jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
    weights = jax.nn.softmax(jnp.where(seen, x @ params["attend"] @ x.mT, -1e9))
    return jnp.tanh(jnp.concatenate([x, weights @ x], -1) @ params["mix"])


def reward(rollout: Rollout) -> jax.Array:
    answer = rollout.tokens[:, -ANSWER:]
    digits = (rollout.action_mask & (answer < EOS))[:, 1:]
    rises = answer[:, 1:] > answer[:, :-1]
    return jnp.sum(jnp.where(digits, jnp.where(rises, 1.0, -1.0), 0.0), 1) + rollout.finished


MODEL = models.without_cache(
    hidden, vocab_size=VOCAB, init=init, logits=lambda p, h: 8 * h @ p["embed"].T, score=lambda p, h: h @ p["value"]
)


def main(steps: int = 60) -> list[float]:
    settings, tx = config.PPO(kl_coef=0.01), optax.adam(3e-3)
    run = functional.online(
        ppo.build(settings), MODEL, config.Sampling(max_new_tokens=ANSWER), stop_ids=(EOS,), pad_id=PAD, actor_tx=tx, critic_tx=tx
    )
    params = MODEL.init(jax.random.key(0))
    state, frozen = run.init(params, critic=params, kl_coef=settings.kl_coef), Frozen(reference=params)
    first = jnp.arange(128, dtype=jnp.int32)
    prompts = Prompts(tokens=first[:, None] % 10, mask=jnp.ones((128, 1), bool), index=first)

    @jax.jit
    def step(state, key):
        rollout = run.sample(state, frozen, prompts, key)
        return run.learn(state, frozen, rollout, reward(rollout), key)

    scores = []
    for key in jax.random.split(jax.random.key(1), steps):
        state, metrics = step(state, key)
        scores.append(float(metrics["reward/score"]))
        print(f"score {scores[-1]:.2f}   KL {metrics['kl/per_sequence_nats']:.2f} nats")
    return scores


if __name__ == "__main__":
    main()
