"""Every jitted program of a run, with its shapes, shardings and donations.

The loops run them; `fit` compiles the same ones ahead of time for a machine that is not there. A program is data: a pure
function and abstract arguments, so nothing here needs weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from rlhf_jax import config, parallel, sampling, scoring
from rlhf_jax.types import (
    Calibration,
    Experience,
    Frozen,
    Model,
    Moments,
    Params,
    Preferences,
    Prompts,
    Rollout,
    RunState,
    Scored,
    Sequences,
    TrainState,
    join,
)

ALARMS = 6  # length of RunState.alarms: KL, ratio, entropy, score spread, end-of-sequence rate, length


class Part(NamedTuple):
    """One model of a run: its functions, and its parameters as shapes with shardings."""

    model: Model
    trained: Params  # what an optimiser changes, or all of a frozen model
    frozen: Params | None = None  # the base under an adapter


class Parts(NamedTuple):
    """The models of an online run."""

    actor: Part
    critic: Part | None = None
    reference: Part | None = None  # None with LoRA: the actor's base
    reward: Part | None = None  # None: host rewards only
    calibration: Calibration = Calibration()


class Program(NamedTuple):
    """A step before it is compiled."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]  # jax.ShapeDtypeStruct with shardings
    out: Any = None  # shardings of the results; None leaves them to the compiler
    donate: tuple[int, ...] = ()

    def compile(self) -> Any:
        """The jitted step; XLA compiles it at the first call."""
        return parallel.compile_step(self.fn, out=self.out, donate=self.donate)


def shardings(tree: Any) -> Any:
    """Shardings of a tree of abstract (or real) arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def abstract(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def abstract_like(tree: Any, where: Any) -> Any:
    """Shapes of a tree, with one sharding for all or a tree of them."""
    if isinstance(where, NamedSharding):
        return jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype, where), tree)
    return jax.tree.map(lambda leaf, sharding: abstract(leaf.shape, leaf.dtype, sharding), tree, where)


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return abstract(key.shape, key.dtype, parallel.replicated(mesh))


def abstract_params(model: Model, mesh: Mesh, *, head: str, dtype: Any) -> Params:
    """Parameters of a model as shapes with shardings."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), head=head))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    return placed(model, mesh, shapes)


def placed(model: Model, mesh: Mesh, shapes: Params) -> Params:
    """Shapes of (a part of) a model's parameters -> the same with shardings."""
    return abstract_like(shapes, parallel.param_shardings(mesh, model.axes(shapes), shapes))


def abstract_train_state(mesh: Mesh, tx: optax.GradientTransformation, params: Params) -> TrainState:
    """A train state as shapes: optimiser moments lie where their parameters lie."""
    where = parallel.optimizer_shardings(mesh, tx, params, shardings(params))
    step = abstract((), jnp.int32, parallel.replicated(mesh))
    return TrainState(step=step, params=params, opt_state=abstract_like(jax.eval_shape(tx.init, params), where))


def init_train_state(tx: optax.GradientTransformation, params: Params) -> TrainState:
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))


def abstract_run_state(
    mesh: Mesh, parts: Parts, actor_tx: optax.GradientTransformation, critic_tx: optax.GradientTransformation, *, ema: bool
) -> RunState:
    """The whole state of an online run as shapes with shardings: what is restored, and what `fit` counts."""
    rep = parallel.replicated(mesh)
    scalar, count = abstract((), jnp.float32, rep), abstract((), jnp.int32, rep)
    return RunState(
        step=count,
        cursor=count,
        actor=abstract_train_state(mesh, actor_tx, parts.actor.trained),
        critic=None if parts.critic is None else abstract_train_state(mesh, critic_tx, parts.critic.trained),
        ema=parts.actor.trained if ema else None,
        kl_coef=scalar,
        scores=Moments(count=scalar, mean=scalar, m2=scalar),
        best=scalar,
        bad_steps=count,
        alarms=abstract((ALARMS,), jnp.int32, rep),
    )


def abstract_frozen(parts: Parts) -> Frozen:
    """The parameters that no step changes, as shapes."""
    return Frozen(
        actor=parts.actor.frozen,
        critic=None if parts.critic is None else parts.critic.frozen,
        reference=None if parts.reference is None else parts.reference.trained,
        reward=None if parts.reward is None else join(parts.reward.frozen, parts.reward.trained),
    )


def abstract_prompts(mesh: Mesh, rows: int, length: int) -> Prompts:
    where = parallel.batch_sharding(mesh)
    index = abstract((rows,), jnp.int32, where)
    tokens, mask = abstract((rows, length), jnp.int32, where), abstract((rows, length), jnp.bool_, where)
    return Prompts(tokens=tokens, mask=mask, index=index, sample=index)


def abstract_sequences(mesh: Mesh, rows: int, length: int, *, packed: bool = False) -> Sequences:
    where = parallel.batch_sharding(mesh)
    tokens, mask = abstract((rows, length), jnp.int32, where), abstract((rows, length), jnp.bool_, where)
    extra = tokens if packed else None
    return Sequences(tokens=tokens, mask=mask, target_mask=mask, segments=extra, positions=extra)


def online_programs(
    run: config.PPORun,
    algorithm: Any,
    mesh: Mesh,
    parts: Parts,
    *,
    prompt_length: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation,
) -> dict[str, Program]:
    """The programs of an online run: sync, rollout, reward, score, learn."""
    rep, rows = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    actor, frozen = parts.actor, abstract_frozen(parts)
    ema = getattr(run.ppo, "ema_decay", None) is not None
    state = abstract_run_state(mesh, parts, actor_tx, critic_tx, ema=ema)
    prompts, key = abstract_prompts(mesh, run.batch_size, prompt_length), abstract_key(mesh)

    def sync(params: Params, base: Params | None) -> Params:
        return actor.model.for_decoding(join(base, params))

    decoding = jax.eval_shape(sync, actor.trained, actor.frozen)
    decoding = abstract_like(decoding, parallel.param_shardings(mesh, actor.model.axes(decoding), decoding, gather=("fsdp",)))
    sample = sampling.make_sampler(actor.model, run.sampling, stop_ids=stop_ids, pad_id=pad_id)
    rollout: Rollout = abstract_like(jax.eval_shape(sample, decoding, prompts, key), rows)
    score = _score(run, algorithm, parts)
    critic_params = None if state.critic is None else state.critic.params
    scored: Scored = abstract_like(jax.eval_shape(score, actor.trained, critic_params, frozen, rollout), rows)
    scores = abstract((run.batch_size,), jnp.float32, rows)
    ptx = None
    if run.ptx_data is not None:
        ptx = abstract_sequences(mesh, run.batch_size, run.ptx_data.max_tokens)
    programs = {
        "sync": Program(sync, (actor.trained, actor.frozen), shardings(decoding)),
        "rollout": Program(sample, (decoding, prompts, key), rows),
        "score": Program(score, (actor.trained, critic_params, frozen, rollout), rows),
        "learn": Program(
            _learn(run, algorithm, parts, actor_tx, critic_tx),
            (state, frozen, rollout, scores, scored, key, ptx),
            (shardings(state), rep),
            donate=(0,),
        ),
    }
    if parts.reward is not None:
        score_reward = scoring.make_reward_scorer(parts.reward.model, parts.calibration)
        programs["reward"] = Program(_in_parts(score_reward, run.score_parts), (frozen.reward, rollout), rows)
    return programs


def offline_program(
    update: Callable[..., Any], mesh: Mesh, state: TrainState, frozen: Frozen, batch: Sequences | Preferences
) -> Program:
    """The one program of an offline run: (state, batch, frozen) -> (state, metrics)."""
    return Program(update, (state, batch, frozen), (shardings(state), parallel.replicated(mesh)), donate=(0,))


def _score(run: config.PPORun, algorithm: Any, parts: Parts) -> Callable[..., Scored]:
    scorer = scoring.make_scorer(
        parts.actor.model,
        None if parts.critic is None else parts.critic.model,
        temperature=run.sampling.temperature,
        chunk=run.model.logprob_chunk,
        needs=algorithm.needs,
    )

    def score(actor: Params, critic: Params | None, frozen: Frozen, rollout: Rollout) -> Scored:
        return _in_parts(lambda _, part: scorer(actor, critic, frozen, part), run.score_parts)(None, rollout)

    return score


def _learn(
    run: config.PPORun,
    algorithm: Any,
    parts: Parts,
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation,
) -> Callable[..., Any]:
    policy = scoring.make_policy_apply(
        parts.actor.model,
        temperature=run.sampling.temperature,
        chunk=run.model.logprob_chunk,
        entropy=True,
    )
    value = None if parts.critic is None else scoring.make_value_apply(parts.critic.model)
    update = algorithm.make_update(policy, value, actor_tx, critic_tx)

    def learn(
        state: RunState,
        frozen: Frozen,
        rollout: Rollout,
        scores: jax.Array,
        scored: Scored,
        key: jax.Array,
        ptx: Sequences | None,
    ) -> tuple[RunState, dict[str, jax.Array]]:
        experience: Experience
        experience, shaping = algorithm.make_experience(rollout, scores, scored, state.kl_coef)
        state, metrics = update(state, experience, key, frozen, ptx)
        return state, shaping | metrics

    return learn


def _in_parts(fn: Callable[[Any, Any], Any], parts: int) -> Callable[[Any, Any], Any]:
    """Apply `fn(params, rows)` to interleaved parts of the rows, one after the other: every part stays split as the batch is."""
    if parts == 1:
        return fn

    def apply(params: Any, batch: Any) -> Any:
        split = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
        results = jax.lax.map(lambda part: fn(params, part), split)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)

    return apply
