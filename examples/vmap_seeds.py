"""Whole PPO runs side by side: seeds, learning rates and KL coefficients are axes of one compiled program.

    python examples/vmap_seeds.py                under a minute on two cores

Every run makes its own small language model, samples, is scored and updated. Nothing leaves the program before the table. A
learning rate is an argument like any other, because optax's updates are functions of it; the KL coefficient is part of the state.
"""

import itertools
import time

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import config, functional, models, testing
from rlhf_jax.algorithms import ppo
from rlhf_jax.types import Frozen, Prompts, Rollout

EOS, PAD, VOCAB, ANSWER, ROWS = 10, 11, 12, 6, 64  # tokens 0 to 9 are digits
MODEL = models.make_model(models.scratch_spec(testing.tiny_scratch(VOCAB), VOCAB))


def reward(rollout: Rollout) -> jax.Array:
    """1 for every digit that is one more than the one before it (the prompt is a digit too), 1 for ending: f32[B]."""
    after, before = rollout.tokens[:, -ANSWER:], rollout.tokens[:, -ANSWER - 1 : -1]
    follows = rollout.action_mask & (after < EOS) & (after == before + 1)
    return jnp.sum(follows, 1) + rollout.finished.astype(jnp.float32)


def learn(seed: jax.Array, learning_rate: jax.Array, kl_coef: jax.Array, *, steps: int) -> tuple[jax.Array, jax.Array]:
    """A complete run: mean score and KL in nats of every step, f32[steps] each."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    run = functional.online(
        ppo.build(config.PPO(epochs=2)),
        MODEL,
        config.Sampling(max_new_tokens=ANSWER),
        stop_ids=(EOS,),
        pad_id=PAD,
        actor_tx=tx,
        critic_tx=tx,
    )
    root = jax.random.key(seed)
    actor, critic = (MODEL.init(jax.random.fold_in(root, n), head=head) for n, head in enumerate(("lm", "score")))
    state, frozen = run.init(actor, critic=critic, kl_coef=kl_coef), Frozen(reference=actor)
    row = jnp.arange(ROWS, dtype=jnp.int32)
    prompts = Prompts(tokens=row[:, None] % 5, mask=jnp.ones((ROWS, 1), bool), index=row)

    def step(state, key):
        rollout = run.sample(state, frozen, prompts, key)
        state, metrics = run.learn(state, frozen, rollout, reward(rollout), key)
        return state, (metrics["reward/score"], metrics["kl/per_sequence_nats"])

    return jax.lax.scan(step, state, jax.random.split(jax.random.fold_in(root, 2), steps))[1]


def main(
    steps: int = 60,
    seeds: int = 4,
    learning_rates: tuple[float, ...] = (1e-3, 3e-3),
    kl_coefs: tuple[float, ...] = (0.0, 0.2),
) -> str:
    grid = jnp.asarray(list(itertools.product(learning_rates, kl_coefs)))
    began = time.perf_counter()
    over_seeds = jax.vmap(lambda seed, rate, coef: learn(seed, rate, coef, steps=steps), (0, None, None))
    over_grid = jax.vmap(over_seeds, (None, 0, 0))
    compiled = jax.jit(over_grid).lower(jnp.arange(seeds), grid[:, 0], grid[:, 1]).compile()
    built = time.perf_counter()
    scores, kl = jax.block_until_ready(compiled(jnp.arange(seeds), grid[:, 0], grid[:, 1]))  # f32[settings, seeds, steps]
    ended = time.perf_counter()
    last = max(1, steps // 10)
    lines = ["learning rate   kl_coef   score: start -> end (standard error)      KL, nats"]
    for (rate, coef), score, nats in zip(grid.tolist(), scores, kl, strict=True):
        end = score[:, -last:].mean(1)
        lines.append(
            f"{rate:13.0e} {coef:9.2f}         {score[:, 0].mean():5.2f} -> {end.mean():5.2f} ({end.std() / seeds**0.5:.2f})"
            f"{nats[:, -last:].mean():18.2f}"
        )
    lines.append(f"{len(grid) * seeds} runs of {steps} steps: {built - began:.0f} s to compile, {ended - built:.0f} s to run")
    table = "\n".join(lines)
    print(table)
    return table


if __name__ == "__main__":
    main()
