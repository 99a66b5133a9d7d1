"""What a run holds beside its state: data, models, algorithm, compiled programs. Made once, never changed.

A plan is cheap (tokenizer and data are read and checked, nothing is loaded or compiled); a setup has weights.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rlhf_jax import build, checks, config, parallel, programs
from rlhf_jax.algorithms import training
from rlhf_jax.build import Loaded
from rlhf_jax.data import buckets
from rlhf_jax.data.batches import (
    LabelledData,
    PreferenceData,
    PromptData,
    SFTData,
    make_labelled_data,
    make_preference_data,
    make_prompt_data,
    make_sft_data,
)
from rlhf_jax.data.table import describe, purpose_of
from rlhf_jax.data.tasks import TASKS
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.rewards import REWARDS, HostReward, make_reward
from rlhf_jax.rundir import fingerprint
from rlhf_jax.setups_abstract import HEADS, abstract_programs, online_optimizers, reference_of
from rlhf_jax.types import Frozen, OfflineState, Params, Prompts, RewardFn, RewardInput, RunState, Sequences, join

PROBED = 64  # rows that the rewards of this package read before a run starts


@dataclass(frozen=True)
class OnlinePlan:
    """An online run before anything is loaded."""

    stage: str
    settings: config.OnlineRun
    algorithm: training.Algorithm
    mesh: Mesh
    tokenizer: Tokenizer
    data: PromptData
    ptx: SFTData | None

    @property
    def notes(self) -> list[str]:
        """What a user should know before the run starts: what was dropped, what was decided."""
        widths = ", ".join(str(bucket.width) for bucket in self.data.buckets)
        return [
            f"data: {describe(self.data.tables.counts())}",
            *(f"tokenizer: {text}" for text in self.tokenizer.policies),
            f"data: prompts {widths} tokens wide (data.length_buckets), {self.data.padded_fraction:.1%} of that is padding; "
            f"{buckets.programs(self.settings, len(self.data.buckets))} programs",
            *offload_notes(self.settings, self.mesh),
            *([f"ptx_data: not read, {self.stage}.ptx_coef is 0"] if self.settings.ptx_data and not self.ptx else []),
        ]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what must not change while the run exists."""
        settings = self.settings
        paths = {"model": settings.model.path, "reference": settings.reference or settings.model.path}
        paths |= {"reward": settings.reward.model, "critic": getattr(settings, "critic", None), "adapter": adapter_of(settings)}
        found = {name: fingerprint(path) for name, path in paths.items()}
        files = dict.fromkeys(each.function.rpartition(":")[0] for each in settings.reward.functions)
        found["reward.functions"] = ", ".join(fingerprint(path) for path in files if path) or "none"
        found |= {} if self.ptx is None else {"ptx_data": self.ptx.fingerprint()}
        return found | {"data": self.data.fingerprint(), "tokenizer": self.tokenizer.hash}

    def sizes(self) -> dict[str, Any]:
        """What the run will keep in memory, as shapes by name."""
        return abstract_programs(self.stage, self.settings, self.mesh)[1]


@dataclass(frozen=True)
class OnlineSetup:
    """An online run with its models loaded and its programs ready to compile."""

    plan: OnlinePlan
    actor: Loaded
    critic: Loaded | None
    frozen: Frozen
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation]
    abstract: RunState  # the state as shapes with shardings
    do: Mapping[str, Any]  # compiled programs by name
    host_reward: HostReward | None
    gold: RewardFn | None  # the truth of an embedded task: logged, never trained on

    @property
    def settings(self) -> config.OnlineRun:
        return self.plan.settings

    @property
    def data(self) -> PromptData:
        return self.plan.data

    @property
    def tokenizer(self) -> Tokenizer:
        return self.plan.tokenizer

    def prompts(self, step: int) -> Prompts:
        """The prompts of a step, to be answered `group_size` times each; a pure function of (seed, step)."""
        return _numbered(self.data.batch(step), self.plan.algorithm.group_size)

    def evaluation_prompts(self) -> Prompts:
        """The fixed prompts, as many as a batch has answers, to be answered once each."""
        return _numbered(self.data.eval_batch(self.settings.batch_size), 1)

    def ptx_batch(self, step: int) -> Sequences | None:
        return None if self.plan.ptx is None else self.place(self.plan.ptx.batch(step))

    def place(self, batch: Any) -> Any:
        """Host arrays with a leading batch axis -> the devices."""
        rows = jax.tree.leaves(batch)[0].shape[0]
        return parallel.place(batch, parallel.batch_sharding(self.plan.mesh, rows))

    def scalar(self, value: float) -> jax.Array:
        return parallel.place(np.float32(value), parallel.replicated(self.plan.mesh))

    def components(self) -> dict[str, Any]:
        """What is resident, by name, for the message when memory runs out."""
        found = {"actor and optimiser": self.abstract.actor, "reference": self.frozen.reference, "reward": self.frozen.reward}
        return found | {"critic and optimiser": self.abstract.critic, "base": self.frozen.actor}

    def begin(self, restored: RunState | None) -> RunState:
        """The state to train from, once: the weights that were loaded go into it, or away where an earlier state goes on."""
        if restored is None:
            return self.initial_state()
        _let_go(self.actor.params, None if self.critic is None else self.critic.params)
        return restored

    def initial_state(self) -> RunState:
        """The state before the first step; takes the weights that were loaded over (donated: a second copy would stay)."""
        kl_coef = getattr(self.settings, self.plan.stage).kl_coef
        ema = self.abstract.ema is not None

        def make(actor: Params, critic: Params | None) -> RunState:
            return programs.init_run_state(*self.optimizers, actor, critic, kl_coef, ema=ema)

        critic = None if self.critic is None else self.critic.params
        where = programs.shardings(self.abstract)
        return parallel.compile_step(make, out=where, donate=(0, 1))(self.actor.params, critic)

    def average(self, state: RunState) -> Params | None:
        """The actor's moving average in the type of its parameters, so that the programs that take these take it."""
        if state.ema is None:
            return None
        like = self.abstract.actor.params
        return jax.tree.map(lambda x, want: jax.device_put(x.astype(want.dtype), want.sharding), state.ema, like)

    def export(self, state: RunState) -> None:
        """Write the actor (its average too) and the critic as Hugging Face directories below `out`."""
        out = Path(self.settings.out)
        write = functools.partial(build.export, tokenizer=self.tokenizer)
        write(out / "final", self.actor, state.actor.params, head="lm")
        if state.ema is not None:
            write(out / "final-ema", self.actor, self.average(state), head="lm")
        if state.critic is not None and self.critic is not None:
            write(out / "final-critic", self.critic, state.critic.params, head="value")


def _let_go(*trees: Params) -> None:
    for leaf in jax.tree.leaves(trees):
        leaf.delete()


def plan_online(stage: str, settings: config.OnlineRun) -> OnlinePlan:
    """Read and check everything that is cheap: keys, mesh, algorithm, tokenizer, data, reward functions."""
    checks.check(settings)
    mesh = parallel.make_mesh(settings.mesh)
    settings = build.for_mesh(settings, mesh)
    checks.check_batch(settings, parallel.axis_size(mesh, "batch"))
    algorithm = build.algorithm(stage, settings)
    tokenizer = build.tokenizer_for(stage, settings)
    build.stop_ids(settings.sampling, tokenizer)
    if settings.batch_size % algorithm.group_size:
        raise UserError(
            f"batch_size = {settings.batch_size} answers is not a multiple of {stage}.group_size = {algorithm.group_size}"
        )
    prompts = settings.batch_size // algorithm.group_size
    data = make_prompt_data(settings.data, tokenizer, seed=settings.seed, batch_size=prompts)
    ptx = None
    if getattr(settings, stage).ptx_coef > 0 and settings.ptx_data is not None:
        ptx = make_sft_data(settings.ptx_data, tokenizer, seed=settings.seed, batch_size=settings.batch_size)
    _try_rewards(settings.reward, tokenizer, data)
    build.check_others(settings, tokenizer)
    return OnlinePlan(stage, settings, algorithm, mesh, tokenizer, data, ptx)


def set_up_online(plan: OnlinePlan) -> OnlineSetup:
    """Load the models onto the mesh and describe the programs."""
    settings, mesh, algorithm = plan.settings, plan.mesh, plan.algorithm
    vocab = plan.tokenizer.vocab_size
    load = functools.partial(build.load, settings.model, mesh, real_vocab=vocab, length=build.longest(settings))
    path = settings.model.path
    actor = load(head="lm", key=build.root_key(settings, "model"), path=path, adapter=adapter_of(settings))
    reference = _reference(settings, actor, load) if "reference" in algorithm.needs else None
    scorer = None
    if settings.reward.model is not None and lora.is_adapter(settings.reward.model):
        scorer = build.load_on(settings.model, mesh, actor, head="score", path=settings.reward.model)
    elif settings.reward.model is not None:
        scorer = load(head="score", key=None, path=settings.reward.model, trained=False)
    critic = None
    if "critic" in algorithm.needs:
        given = getattr(settings, "critic", None) or settings.reward.model
        adapter = given if lora.is_adapter(given) else None
        given = None if adapter else given
        shared = actor.base if given in (None, path) else None
        key = build.root_key(settings, "critic")
        critic = load(head="value", key=key, path=given or path, base=shared, zero_head=True, adapter=adapter)
    parts = programs.Parts(
        actor=actor.part,
        critic=None if critic is None else critic.part,
        reference=None if reference is None else reference.part,
        reward=None if scorer is None else scorer.part,
    )
    frozen = Frozen(
        actor=actor.base,
        critic=None if critic is None else critic.base,
        reference=None if reference is None else reference.params,
        reward=None if scorer is None else join(scorer.base, scorer.params),
    )
    optimizers = online_optimizers(plan.stage, settings)
    steps = programs.online_programs(
        plan.stage,
        settings,
        algorithm,
        mesh,
        parts,
        prompt_length=plan.data.length,
        stop_ids=build.stop_ids(settings.sampling, plan.tokenizer),
        pad_id=plan.tokenizer.pad_id,
        optimizers=optimizers,
        ptx_length=None if plan.ptx is None else plan.ptx.length,
        calibration=scorer.calibration if scorer is not None else None,
    )
    host, gold = rewards_of(settings, plan.tokenizer)
    state, places = steps["learn"].args[:2]
    return OnlineSetup(
        plan=plan,
        actor=actor,
        critic=critic,
        frozen=jax.device_put(frozen, programs.shardings(places)) if settings.model.offload else frozen,
        optimizers=optimizers,
        abstract=state,
        do={name: step.compile() for name, step in steps.items()},
        host_reward=host,
        gold=gold,
    )


def _try_rewards(reward: config.Reward, tokenizer: Tokenizer, data: PromptData) -> None:
    """Make the host rewards, and let those of this package read some rows, with an empty answer: a column may be missing."""
    make_reward(reward, tokenizer)
    shipped = tuple(each for each in reward.functions if each.function in REWARDS)
    if shipped:
        rows = data.eval_batch(PROBED).index
        batch = RewardInput(data.texts(rows), [""] * len(rows), np.ones(len(rows), bool), data.columns(rows))
        make_reward(config.Reward(functions=shipped, timeout_s=reward.timeout_s), tokenizer)(batch)


def _reference(settings: Any, trained: Loaded, load: Callable[..., Loaded]) -> Loaded | None:
    def whole(path: str | None) -> Loaded:
        return load(head="lm", key=build.root_key(settings, "model"), path=path, trained=False)

    return reference_of(settings, lambda: build.begun_with(trained), whole)


def offload_notes(settings: config.Run, mesh: Mesh) -> list[str]:
    """What becomes of model.offload where it saves nothing."""
    if not settings.model.offload:
        return []
    if not parallel.can_park(mesh):
        return ["model.offload: these devices cannot read the host's memory; everything stays in theirs"]
    if mesh.devices.flat[0].platform == "cpu":
        return ["model.offload: on CPU the devices' memory is the host's; nothing is saved"]
    return []


def adapter_of(settings: config.Run) -> str | None:
    """The adapter that the trained model begins with."""
    return None if settings.model.lora is None else settings.model.lora.path


def rewards_of(settings: config.OnlineRun, tokenizer: Tokenizer) -> tuple[HostReward | None, RewardFn | None]:
    """Host rewards, and the gold reward of an embedded task. A task without any other reward is trained on its own."""
    reward, task = settings.reward, settings.data.task
    host = make_reward(reward, tokenizer) if reward.functions or reward.url else None
    truth = None if task is None else TASKS[task].reward
    if host is None and reward.model is None and truth is not None:
        return (lambda batch: (np.asarray(truth(batch), np.float32), {})), None
    return host, truth


def _numbered(prompts: Prompts, times: int) -> Prompts:
    """The number of each prompt's first answer; a row that a batch holds twice (two epochs meet) counts on."""
    return prompts.replace(sample=occurrences(np.asarray(prompts.index)) * np.int32(times))


def occurrences(index: np.ndarray) -> np.ndarray:
    """How often the same number stood before: [5, 3, 5, 5] -> [0, 0, 1, 2]."""
    seen: dict[int, int] = {}
    out = np.zeros(len(index), np.int32)
    for place, number in enumerate(index.tolist()):
        out[place] = seen.get(number, 0)
        seen[number] = out[place] + 1
    return out


# ------------------------------------------------------------------------------------------------------ offline


@dataclass(frozen=True)
class OfflinePlan:
    """A fine-tuning, reward-model or preference run before anything is loaded."""

    stage: str
    settings: Any
    mesh: Mesh
    tokenizer: Tokenizer
    data: SFTData | PreferenceData | LabelledData

    @property
    def notes(self) -> list[str]:
        """What a user should know before the run starts: what was dropped, what was decided."""
        found = [f"data: {describe(self.data.tables.counts())}", *(f"tokenizer: {text}" for text in self.tokenizer.policies)]
        if isinstance(self.data, SFTData):
            found.append(f"data: {self.data.padded_fraction:.1%} of the tokens of a batch are padding")
        if isinstance(self.data, PreferenceData) and self.data.has_margin:
            loss = self.settings.reward_model.loss if self.stage == "reward" else self.stage
            if loss != "bradley_terry":
                found.append(f"data: {loss} takes no margins: they are left out")
        return [*found, *offload_notes(self.settings, self.mesh)]

    @property
    def fingerprints(self) -> dict[str, str]:
        paths = {"model": self.settings.model.path, "reference": getattr(self.settings, "reference", None)}
        paths |= {"adapter": adapter_of(self.settings)}
        found = {name: fingerprint(path) for name, path in paths.items()}
        return found | {"data": self.data.fingerprint(), "tokenizer": self.tokenizer.hash}

    def sizes(self) -> dict[str, Any]:
        """What the run will keep in memory, as shapes by name."""
        return abstract_programs(self.stage, self.settings, self.mesh)[1]


@dataclass(frozen=True)
class OfflineSetup:
    """An offline run with its model loaded."""

    plan: OfflinePlan
    trained: Loaded
    frozen: Frozen
    optimizer: optax.GradientTransformation
    abstract: OfflineState  # the state as shapes with shardings
    update: Any  # (state, batch, frozen) -> (state, metrics), compiled
    evaluate: Any  # (params, frozen, batch) -> what `offline.evaluate` averages, compiled

    @property
    def settings(self) -> Any:
        return self.plan.settings

    def place(self, batch: Any) -> Any:
        return parallel.place(batch, parallel.batch_sharding(self.plan.mesh))

    def components(self) -> dict[str, Any]:
        """What is resident, by name, for the message when memory runs out."""
        return {"model and optimiser": self.abstract, "base": self.frozen.actor, "reference": self.frozen.reference}

    def scalar(self, value: float) -> jax.Array:
        return parallel.place(np.float32(value), parallel.replicated(self.plan.mesh))

    def begin(self, restored: OfflineState | None) -> OfflineState:
        """As `OnlineSetup.begin`."""
        if restored is None:
            return self.initial_state()
        _let_go(self.trained.params)
        return restored

    def initial_state(self) -> OfflineState:
        """The state before the first step; takes the weights that were loaded over."""
        make = functools.partial(programs.init_offline_state, self.optimizer)
        return parallel.compile_step(make, out=programs.shardings(self.abstract), donate=(0,))(self.trained.params)


def plan_offline(stage: str, settings: Any) -> OfflinePlan:
    """Read and check keys, mesh, tokenizer and data."""
    checks.check(settings)
    mesh = parallel.make_mesh(settings.mesh)
    settings = build.for_mesh(settings, mesh)
    checks.check_batch(settings, parallel.axis_size(mesh, "batch"))
    tokenizer = build.tokenizer_for(stage, settings)
    makers: dict[str, Callable[..., Any]] = {"sft": make_sft_data, "labels": make_labelled_data}
    make = makers.get(purpose_of(stage, settings.data), make_preference_data)
    build.offline_algorithm(stage, settings)  # settings that contradict each other are told before anything is read
    build.check_others(settings, tokenizer)
    data = make(settings.data, tokenizer, seed=settings.seed, batch_size=settings.batch_size)
    return OfflinePlan(stage, settings, mesh, tokenizer, data)


def set_up_offline(plan: OfflinePlan) -> OfflineSetup:
    """Load the model (and a reference where the algorithm has one) and describe the programs."""
    settings, mesh, stage = plan.settings, plan.mesh, plan.stage
    head = HEADS.get(stage, "lm")
    length = build.longest(settings)
    load = functools.partial(build.load, settings.model, mesh, real_vocab=plan.tokenizer.vocab_size, length=length)
    trained = load(head=head, key=build.root_key(settings, "model"), path=settings.model.path, adapter=adapter_of(settings))
    reference = _reference(settings, trained, load) if hasattr(settings, "reference") else None
    frozen = Frozen(actor=trained.base, reference=None if reference is None else reference.params)
    tx = training.make_optimizer(settings.optimizer, settings.steps)
    aside = settings.model.offload if parallel.can_park(mesh) else ()
    abstract = programs.park_state(programs.abstract_offline_state(mesh, tx, trained.part.trained), aside)
    places = Frozen(actor=trained.part.frozen, reference=None if reference is None else reference.part.trained)
    places = programs.park_frozen(places, aside)
    algorithm = build.offline_algorithm(stage, settings)
    do = programs.offline_programs(stage, settings, algorithm, trained.model, tx, abstract, places)
    return OfflineSetup(
        plan=plan,
        trained=trained,
        frozen=jax.device_put(frozen, programs.shardings(places)) if aside else frozen,
        optimizer=tx,
        abstract=abstract,
        update=do["update"].compile(),
        evaluate=do["evaluate"].compile(),
    )
