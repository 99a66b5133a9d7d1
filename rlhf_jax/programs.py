"""Every jitted program of a run, with its shapes, shardings and donations.

The loops run them; `fit` compiles the same ones ahead of time for a machine that is not there. A program is data: a pure
function and abstract arguments, so nothing here needs weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from rlhf_jax import config, continuous, health, packed, parallel, sampling, scoring
from rlhf_jax.algorithms import training
from rlhf_jax.types import (
    Calibration,
    Frozen,
    Model,
    Moments,
    OfflineState,
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

ALARMS = len(health.ALARMS)


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


class Program(NamedTuple):
    """A step before it is compiled."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]  # jax.ShapeDtypeStruct with shardings
    out: Any = None  # shardings of the results; None leaves them to the compiler
    donate: tuple[int, ...] = ()

    def compile(self, platform: str | None = None) -> Any:
        """The jitted step; XLA compiles it at the first call, for this process's devices or (`lower`) another platform."""
        fn = parallel.on_device(self.fn, _brought(self.args))
        return parallel.compile_step(fn, out=self.out, donate=self.donate, platform=platform)


def _brought(args: tuple[Any, ...]) -> Any:
    """Arguments as a program wants them to be brought to the devices: optimiser states not, which each step brings for itself."""

    def stays(state: Any) -> Any:
        if not isinstance(state, TrainState):
            return state
        there = jax.tree.map(lambda x: abstract(x.shape, x.dtype, x.sharding.with_memory_kind("device")), state.opt_state)
        return state.replace(opt_state=there)

    return jax.tree.map(stays, args, is_leaf=lambda x: isinstance(x, TrainState))


def shardings(tree: Any) -> Any:
    """Shardings of a tree of abstract (or real) arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def abstract(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
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
        ema=jax.tree.map(lambda x: abstract(x.shape, jnp.float32, x.sharding), parts.actor.trained) if ema else None,
        kl_coef=scalar,
        scores=Moments(count=scalar, mean=scalar, m2=scalar),
        best=scalar,
        bad_steps=count,
        alarms=abstract((ALARMS,), jnp.int32, rep),
    )


def init_run_state(
    actor_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation | None,
    actor: Params,
    critic: Params | None,
    kl_coef: float | jax.Array,
    *,
    ema: bool = False,
) -> RunState:
    """The state before the first step."""
    zero, count = jnp.float32(0), jnp.int32(0)
    return RunState(
        step=count,
        cursor=count,
        actor=init_train_state(actor_tx, actor),
        critic=None if critic is None or critic_tx is None else init_train_state(critic_tx, critic),
        ema=jax.tree.map(lambda x: x.astype(jnp.float32), actor) if ema else None,
        kl_coef=jnp.asarray(kl_coef, jnp.float32),
        scores=Moments(count=zero, mean=zero, m2=zero),
        best=jnp.float32(-jnp.inf),
        bad_steps=count,
        alarms=jnp.zeros((ALARMS,), jnp.int32),
    )


def abstract_frozen(parts: Parts) -> Frozen:
    """The parameters that no step changes, as shapes."""
    return Frozen(
        actor=parts.actor.frozen,
        critic=None if parts.critic is None else parts.critic.frozen,
        reference=None if parts.reference is None else parts.reference.trained,
        reward=None if parts.reward is None else join(parts.reward.frozen, parts.reward.trained),
    )


def park_state(state: Any, names: tuple[str, ...]) -> Any:
    """The optimiser states of a run's state (shapes) in the host's memory, where `model.offload` names them."""
    if "optimizer" not in names:
        return state

    def park(trained: TrainState | None) -> TrainState | None:
        return None if trained is None else trained.replace(opt_state=parallel.parked(trained.opt_state))

    if isinstance(state, OfflineState):
        return state.replace(trained=park(state.trained))
    return state.replace(actor=park(state.actor), critic=park(state.critic))


def park_frozen(frozen: Frozen, names: tuple[str, ...]) -> Frozen:
    """Reference and reward model (shapes) in the host's memory, where `model.offload` names them."""
    return frozen.replace(**{name: parallel.parked(getattr(frozen, name)) for name in ("reference", "reward") if name in names})


def abstract_prompts(mesh: Mesh, rows: int, length: int) -> Prompts:
    where = parallel.batch_sharding(mesh, rows)
    index = abstract((rows,), jnp.int32, where)
    tokens, mask = abstract((rows, length), jnp.int32, where), abstract((rows, length), jnp.bool_, where)
    return Prompts(tokens=tokens, mask=mask, index=index, sample=index)


def abstract_sequences(mesh: Mesh, rows: int, length: int, *, packed: bool = False) -> Sequences:
    where = parallel.batch_sharding(mesh)
    tokens, mask = abstract((rows, length), jnp.int32, where), abstract((rows, length), jnp.bool_, where)
    extra = tokens if packed else None
    return Sequences(tokens=tokens, mask=mask, target_mask=mask, segments=extra, positions=extra)


def online_programs(
    stage: str,
    run: config.OnlineRun,
    algorithm: training.Algorithm,
    mesh: Mesh,
    parts: Parts,
    *,
    prompt_length: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    ptx_length: int | None = None,
    calibration: Calibration | None = None,
) -> dict[str, Program]:
    """The programs of an online run: sync, rollout, score, learn; reward with a reward model, greedy with a greedy baseline.

    With several answers to a prompt, `rollout` takes each prompt once, and `answer` is the same for evaluation: one answer each.

    Args:
      stage: names the group of the algorithm's settings in `run`.
      prompt_length: P.
      optimizers: of actor and critic.
      ptx_length: T of the pretraining-mix batches; None without them.
    """
    rep, rows = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    actor, settings, aside = parts.actor, getattr(run, stage), run.model.offload if parallel.can_park(mesh) else ()
    frozen = park_frozen(abstract_frozen(parts), aside)
    state = park_state(abstract_run_state(mesh, parts, *optimizers, ema=settings.ema_decay is not None), aside)
    key, samples = abstract_key(mesh), algorithm.group_size
    prompts = abstract_prompts(mesh, run.batch_size // samples, prompt_length)

    def sync(params: Params, base: Params | None) -> Params:
        return actor.model.for_decoding(join(base, params))

    decoding = jax.eval_shape(sync, actor.trained, actor.frozen)
    decoding = abstract_like(decoding, parallel.param_shardings(mesh, actor.model.axes(decoding), decoding, gather=("fsdp",)))
    make = functools.partial(make_rollout, actor.model, mesh, stop_ids=stop_ids, pad_id=pad_id)
    sample = make(run.sampling, samples=samples)
    rollout: Rollout = abstract_like(jax.eval_shape(sample, decoding, prompts, key), rows)
    packing = _packing(stage, run, mesh, prompt_length + run.sampling.max_new_tokens) if run.data.packing else None
    score = _score(run, algorithm, parts, settings.old_logprobs, packing)
    critic = None if state.critic is None else state.critic.params
    scored: Scored = abstract_like(jax.eval_shape(score, actor.trained, critic, abstract_frozen(parts), rollout), rows)
    scores = abstract((run.batch_size,), jnp.float32, rows)
    if "greedy" in algorithm.needs:
        scored = scored.replace(greedy_score=scores, greedy_finished=rollout.finished, greedy_mask=rollout.action_mask)
    ptx = None if ptx_length is None else abstract_sequences(mesh, run.batch_size, ptx_length)
    found = {
        "sync": Program(sync, (actor.trained, actor.frozen), shardings(decoding)),
        "rollout": Program(sample, (decoding, prompts, key), rows),
        "score": Program(score, (actor.trained, critic, frozen, rollout), rows),
        "learn": Program(
            _learn(run, algorithm, parts, optimizers, mesh, packing, entropy=settings.entropy_coef != 0),
            (state, frozen, rollout, scores, scored, key, ptx),
            (shardings(state), rep),
            donate=(0,),
        ),
    }
    if parts.reward is not None:
        score_reward = scoring.make_reward_scorer(parts.reward.model, calibration)
        found["reward"] = Program(_in_parts(score_reward, run.score_parts, packing), (frozen.reward, rollout), rows)
    if "greedy" in algorithm.needs:
        best = make(dataclasses.replace(run.sampling, temperature=0.0), samples=samples, collect_kept=rollout.kept is not None)
        found["greedy"] = Program(best, (decoding, prompts, key), rows)
    if samples > 1:
        single = abstract_prompts(mesh, run.batch_size, prompt_length)
        found["answer"] = Program(make(run.sampling), (decoding, single, key), rows)
    return found


def make_rollout(model: Model, mesh: Mesh, how: config.Sampling, **options: Any) -> sampling.Sample:
    """The whole batch at once, or `sampling.rows` at a time; these are spread over the shards of the batch, each by itself."""
    if how.rows is None:
        return sampling.make_sampler(model, how, **options)
    rows = how.rows // parallel.axis_size(mesh, "batch")
    return parallel.each_shard(continuous.make_continuous_sampler(model, how, rows=rows, **options), mesh)


def abstract_offline_state(mesh: Mesh, tx: optax.GradientTransformation, params: Params) -> OfflineState:
    """The whole state of an offline run as shapes with shardings."""
    rep = parallel.replicated(mesh)
    count = abstract((), jnp.int32, rep)
    trained = abstract_train_state(mesh, tx, params)
    return OfflineState(step=count, trained=trained, best=abstract((), jnp.float32, rep), bad_steps=count)


def init_offline_state(tx: optax.GradientTransformation, params: Params) -> OfflineState:
    trained = init_train_state(tx, params)
    return OfflineState(step=jnp.int32(0), trained=trained, best=jnp.float32(jnp.inf), bad_steps=jnp.int32(0))


def offline_programs(
    stage: str,
    run: Any,
    algorithm: training.Offline,
    model: Model,
    tx: optax.GradientTransformation,
    state: OfflineState,
    frozen: Frozen,
    batch: Any = None,
) -> dict[str, Program]:
    """update: (state, batch, frozen) -> (state, metrics); evaluate, of a batch that is not trained on: (params, frozen, batch)
    -> (metrics, what each counts). `state`, `frozen`, `batch`: shapes with shardings; a batch is needed to compile ahead of time.
    """
    if stage == "reward":
        inner = scoring.make_score_apply(model, padding=run.reward_model.loss == "deepspeed_chat")
    else:
        inner = scoring.make_sequence_apply(model, run.model.logprob_chunk, correct=stage == "sft")

    def apply(params: Params, frozen: Frozen, batch: Sequences) -> Any:
        return inner(params, frozen.actor, batch)

    loss = functools.partial(algorithm.loss, apply)
    prepare = functools.partial(algorithm.prepare, apply)
    step = training.make_offline_update(loss, algorithm.denominators, tx, run.micro_batches, prepare=prepare)

    def update(state: OfflineState, batch: Any, frozen: Frozen) -> tuple[OfflineState, dict[str, jax.Array]]:
        trained, metrics = step(state.trained, batch, frozen)
        bad = jnp.where(metrics["update/skipped"] > 0, state.bad_steps + 1, 0)
        state = state.replace(step=state.step + 1, trained=trained, bad_steps=bad)
        return state, metrics | {"health/bad_steps": bad}

    def evaluate(params: Params, frozen: Frozen, batch: Sequences | Preferences) -> Any:
        batch = prepare(params, frozen, batch, run.micro_batches)
        counts = algorithm.denominators(batch)
        metrics = loss(params, frozen, batch, counts)[1]
        return metrics, dict.fromkeys(metrics, next(iter(counts.values()))) | algorithm.weights(batch)

    everywhere = parallel.replicated(jax.tree.leaves(state)[0].sharding.mesh)
    return {
        "update": Program(update, (state, batch, frozen), (shardings(state), everywhere), donate=(0,)),
        "evaluate": Program(evaluate, (state.trained.params, frozen, batch), everywhere),
    }


def _score(
    run: config.OnlineRun, algorithm: training.Algorithm, parts: Parts, old_logprobs: Any, packing: packed.Packing | None
) -> Callable[..., Scored]:
    scorer = scoring.make_scorer(
        parts.actor.model,
        None if parts.critic is None else parts.critic.model,
        temperature=run.sampling.temperature,
        chunk=run.model.logprob_chunk,
        needs=algorithm.needs,
        old_logprobs=old_logprobs,
    )

    def score(actor: Params, critic: Params | None, frozen: Frozen, rollout: Rollout) -> Scored:
        return _in_parts(lambda _, part: scorer(actor, critic, frozen, part), run.score_parts, packing)(None, rollout)

    return score


def _learn(
    run: config.OnlineRun,
    algorithm: training.Algorithm,
    parts: Parts,
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    mesh: Mesh,
    packing: packed.Packing | None,
    *,
    entropy: bool,
) -> Callable[..., Any]:
    model, options = parts.actor.model, {"temperature": run.sampling.temperature, "chunk": run.model.logprob_chunk}
    policy = scoring.make_policy_apply(model, entropy=entropy, kl_model=model if "kl" in algorithm.needs else None, **options)
    value = None if parts.critic is None else scoring.make_value_apply(parts.critic.model)
    text = scoring.make_sequence_apply(model, run.model.logprob_chunk)
    update = algorithm.make_update(
        policy,
        value,
        *optimizers,
        sequence_apply=lambda params, frozen, batch: text(params, frozen.actor, batch),
        constrain=parallel.make_constrain_rows(mesh),
        packing=packing,
    )

    def learn(
        state: RunState,
        frozen: Frozen,
        rollout: Rollout,
        scores: jax.Array,
        scored: Scored,
        key: jax.Array,
        ptx: Sequences | None,
    ) -> tuple[RunState, dict[str, jax.Array]]:
        experience, shaping = algorithm.make_experience(rollout, scores, scored, state.kl_coef)
        state, metrics = update(state, experience, key, frozen, ptx)
        metrics = shaping | metrics
        alarms = health.advance_alarms(state.alarms, metrics, run.health, max_new_tokens=run.sampling.max_new_tokens)
        state = state.replace(step=state.step + 1, cursor=state.cursor + rollout.index.shape[0], alarms=alarms)
        return state, metrics | {"health/alarms": alarms, "health/bad_steps": state.bad_steps}

    return learn


def _in_parts(fn: Callable[[Any, Any], Any], parts: int, packing: packed.Packing | None) -> Callable[[Any, Any], Any]:
    """Apply `fn(params, rows)` to parts of the rows, one after the other: packed, or interleaved and split as the batch is."""
    if packing is not None:
        return lambda params, batch: packed.summed(packing, functools.partial(fn, params), batch)
    if parts == 1:
        return fn

    def apply(params: Any, batch: Any) -> Any:
        results = jax.lax.map(lambda part: fn(params, part), training.split_rows(batch, parts))
        return training.join_rows(results)

    return apply


def _packing(stage: str, run: config.OnlineRun, mesh: Mesh, length: int) -> packed.Packing:
    rows, width = packed_shape(stage, run, length, parallel.axis_size(mesh, "batch"))
    constraints = {"spread": parallel.make_constrain_rows(mesh), "whole": parallel.make_constrain_whole(mesh)}
    return packed.Packing(rows, width, skips=mesh.size == 1, **constraints)


def packed_shape(stage: str, run: config.OnlineRun, length: int, ways: int) -> tuple[int, int]:
    """Rows and width of a packed part, which has at most the tokens of a micro-batch (or scored part) of sequences of `length`.

    Rows are `data.max_tokens` wide, but hold a sequence of that length, and every one of `ways` devices has at least one.
    """
    settings = getattr(run, stage)
    each = run.batch_size // max(run.score_parts, settings.minibatches * settings.micro_batches) // ways
    width = min(max(run.data.max_tokens, length), each * length)
    return each * length // width * ways, width
