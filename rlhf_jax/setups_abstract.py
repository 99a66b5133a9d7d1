"""What a run compiles and keeps in memory, as shapes: no weight and no data is read."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax
from jax.sharding import Mesh

from rlhf_jax import build, checks, config, models, parallel, programs
from rlhf_jax.algorithms import training
from rlhf_jax.models import lora
from rlhf_jax.types import Frozen, Preferences

HEADS = {"reward": "score"}  # every other offline stage trains the language model


def online_optimizers(
    stage: str, settings: config.OnlineRun
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Actor's and critic's optimisers; their schedules span every optimiser step of the run."""
    algorithm = getattr(settings, stage)
    per_iteration = algorithm.epochs * algorithm.minibatches
    critic = getattr(settings, "critic_optimizer", settings.actor_optimizer)
    warmup = getattr(algorithm, "critic_warmup", 0)
    return (
        training.make_optimizer(settings.actor_optimizer, max(settings.steps - warmup, 1) * per_iteration),
        training.make_optimizer(critic, settings.steps * per_iteration),
    )


T = TypeVar("T")


def abstract_spec(run: config.Run, path: str | None) -> models.Spec:
    """An architecture by directory, by the name of a public model that is known here, or of model.scratch."""
    if path in models.KNOWN:
        return models.at_fixed_length(models.spec_of(models.KNOWN[path]), build.longest(run))
    return build.read_spec(run.model, path, None, length=build.longest(run))


def abstract_programs(stage: str, settings: Any, mesh: Mesh) -> tuple[dict[str, programs.Program], dict[str, Any]]:
    """Programs of a run, and by name what stays in memory while it runs; nothing is read but config.json files."""
    settings = build.for_mesh(settings, mesh)
    checks.check_batch(settings, parallel.axis_size(mesh, "batch"))
    path, model = settings.model.path, settings.model

    def part(path: str | None, head: str, *, trained: bool) -> programs.Part:
        spec = abstract_spec(settings, path)
        build.check_mesh(spec, mesh)
        return build.abstract_part(model, spec, mesh, head=head, trained=trained)

    if stage in config.OFFLINE:
        return _abstract_offline(stage, settings, mesh, part)
    algorithm = build.algorithm(stage, settings)
    scorer = settings.reward.model
    actor, critic = part(path, "lm", trained=True), None
    if lora.is_adapter(scorer):
        reward = build.abstract_on(model, mesh, abstract_spec(settings, path), actor, head="score", path=scorer)
    else:
        reward = part(scorer, "score", trained=False) if scorer is not None else None
    if "critic" in algorithm.needs:
        given = getattr(settings, "critic", None) or scorer
        given = None if lora.is_adapter(given) else given
        critic = part(given or path, "value", trained=True)
        if given in (None, path):  # one base under both adapters, as `set_up_online` shares it
            critic = critic._replace(frozen=actor.frozen)
    whole = functools.partial(part, head="lm", trained=False)
    parts = programs.Parts(
        actor=actor,
        critic=critic,
        reference=reference_of(settings, lambda: actor, whole) if "reference" in algorithm.needs else None,
        reward=reward,
    )
    optimizers = online_optimizers(stage, settings)
    steps = programs.online_programs(
        stage,
        settings,
        algorithm,
        mesh,
        parts,
        prompt_length=settings.data.max_prompt_tokens,
        stop_ids=(1,),
        pad_id=0,
        optimizers=optimizers,
        ptx_length=None if settings.ptx_data is None else settings.ptx_data.max_tokens,
    )
    state, frozen = steps["learn"].args[0], steps["learn"].args[1]
    resident = {
        "actor": state.actor,
        "critic": state.critic,
        "ema": state.ema,
        "ema to evaluate": None if state.ema is None else jax.tree.map(_cast, state.ema, state.actor.params),
        "reference": frozen.reference,
        "reward": frozen.reward,
        "base": (frozen.actor, frozen.critic),
        "decoding copy": steps["rollout"].args[0],
    }
    return steps, {name: tree for name, tree in resident.items() if jax.tree.leaves(tree)}


def _cast(average: Any, param: Any) -> Any:
    """The leaf that `OnlineSetup.average` makes, or None where it is that of the average."""
    return None if average.dtype == param.dtype else programs.abstract(param.shape, param.dtype, param.sharding)


def reference_of(settings: Any, begun: Callable[[], T], whole: Callable[[str | None], T]) -> T | None:
    """The reference: what the trained model was when it began, or another model that the run names.

    `whole(path)` loads a model (None: the random weights that the run begins with), `begun()` the adapter that training begins
    with. None where that adapter is new: then its base is the reference and needs no copy.
    """
    if settings.reference is None and settings.model.lora is not None:
        return None if settings.model.lora.path is None else begun()
    return whole(settings.reference or settings.model.path)


def _abstract_offline(
    stage: str, settings: Any, mesh: Mesh, part: Callable[..., programs.Part]
) -> tuple[dict[str, programs.Program], dict[str, Any]]:
    tx = training.make_optimizer(settings.optimizer, settings.steps)
    aside = settings.model.offload if parallel.can_park(mesh) else ()
    trained = part(settings.model.path, HEADS.get(stage, "lm"), trained=True)
    whole = functools.partial(part, head="lm", trained=False)
    reference = reference_of(settings, lambda: trained, whole) if hasattr(settings, "reference") else None
    state = programs.park_state(programs.abstract_offline_state(mesh, tx, trained.trained), aside)
    frozen = Frozen(actor=trained.frozen, reference=None if reference is None else reference.trained)
    frozen = programs.park_frozen(frozen, aside)
    rows = programs.abstract_sequences(mesh, settings.batch_size, settings.data.max_tokens, packed=settings.data.packing)
    batch = rows if stage == "sft" else Preferences(chosen=rows, rejected=rows)
    algorithm = build.offline_algorithm(stage, settings)
    steps = programs.offline_programs(stage, settings, algorithm, trained.model, tx, state, frozen, batch)
    resident = {"model": state, "reference": frozen.reference, "base": trained.frozen}
    return steps, {name: tree for name, tree in resident.items() if jax.tree.leaves(tree)}
