"""An online run as pure functions of arrays, without files, text, mesh or clock: for notebooks, sweeps and new ideas.

    run = functional.online(ppo.build(settings), model, sampling, actor_tx=tx, critic_tx=tx, stop_ids=(eos,), pad_id=pad)
    state, frozen = run.init(params, critic=params, kl_coef=0.02), Frozen(reference=params)
    rollout = run.sample(state, frozen, prompts, key)
    state, metrics = run.learn(state, frozen, rollout, scores, key)          scores f32[B]: whatever you want more of

`jax.jit`, `jax.vmap` and `jax.lax.scan` apply to each of them and to a whole run. The command line runs the same samplers,
scorers and updates (`programs.py`), with shardings, checkpoints and a report around them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from rlhf_jax import config, sampling, scoring
from rlhf_jax.algorithms.training import Algorithm, require
from rlhf_jax.programs import init_run_state
from rlhf_jax.types import Frozen, Metrics, Model, Params, Rollout, RunState, join


class Online(NamedTuple):
    """The functions of one iteration."""

    init: Callable[..., RunState]  # (actor's params, *, critic=None, kl_coef=None: the settings' own) -> state
    sample: Callable[..., Rollout]  # (state, frozen, prompts, key) -> rollout, `group_size` answers to each prompt in a row
    greedy: Callable[..., Rollout]  # the same with the likeliest tokens, one answer to each prompt
    # (state, frozen, rollout, scores f32[B], key, *, greedy_scores=None, greedy=None)
    learn: Callable[..., tuple[RunState, Metrics]]


def online(
    algorithm: Algorithm,
    model: Model,
    settings: config.Sampling,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation | None = None,
    critic: Model | None = None,
    entropy: bool = False,
) -> Online:
    """The functions of an online algorithm with this model.

    Args:
      algorithm: such as `ppo.build(config.PPO())`, or your own.
      stop_ids, pad_id: tokens that end an answer; the token that fills rows.
      critic: architecture of the critic; default: the actor's.
      entropy: True where the algorithm's settings have an `entropy_coef`.
    `frozen.reference` is the reference where the algorithm needs one, `frozen.actor` the base of an adapter. ReMax wants
    `greedy_scores`, f32[B]: the scores of what `greedy` answers; with penalties for truncated or overlong answers `learn` takes
    that rollout too, as `greedy`.
    """
    wants_critic = "critic" in algorithm.needs
    critic = (critic or model) if wants_critic else None
    temperature = settings.temperature
    kl_model = model if "kl" in algorithm.needs else None
    options: dict[str, Any] = {"stop_ids": stop_ids, "pad_id": pad_id}
    draw = sampling.make_sampler(model, settings, samples=algorithm.group_size, **options)
    likeliest = sampling.make_sampler(model, dataclasses.replace(settings, temperature=0.0), **options)
    score = scoring.make_scorer(model, critic, temperature=temperature, needs=algorithm.needs)
    policy = scoring.make_policy_apply(model, temperature=temperature, entropy=entropy, kl_model=kl_model)
    value = None if critic is None else scoring.make_value_apply(critic)
    update = algorithm.make_update(policy, value, actor_tx, critic_tx)

    def init(actor: Params, *, critic: Params | None = None, kl_coef: float | jax.Array | None = None) -> RunState:
        return init_run_state(actor_tx, critic_tx, actor, critic, algorithm.kl_coef if kl_coef is None else kl_coef)

    def answer(sampler: sampling.Sample) -> Callable[..., Rollout]:
        return lambda state, frozen, prompts, key: sampler(join(frozen.actor, state.actor.params), prompts, key)

    def learn(
        state: RunState,
        frozen: Frozen,
        rollout: Rollout,
        scores: jax.Array,
        key: jax.Array,
        *,
        greedy_scores: jax.Array | None = None,
        greedy: Rollout | None = None,
    ) -> tuple[RunState, Metrics]:
        values = require(state.critic, "a critic (`init(actor, critic=...)`, critic_tx)").params if wants_critic else None
        scored = score(state.actor.params, values, frozen, rollout).replace(greedy_score=greedy_scores)
        if greedy is not None:
            scored = scored.replace(greedy_finished=greedy.finished, greedy_mask=greedy.action_mask)
        experience, shaping = algorithm.make_experience(rollout, scores, scored, state.kl_coef)
        state, metrics = update(state, experience, key, frozen)
        return state.replace(step=state.step + 1, cursor=state.cursor + scores.shape[0]), shaping | metrics

    return Online(init, answer(draw), answer(likeliest), learn)
