"""From a run file to what the loops hold: tokenizer, models on the mesh, algorithm, programs.

Every model has two trees: what is trained and what is frozen beneath it (the base under a LoRA adapter). Weights are read from
Hugging Face directories straight onto their shardings, or drawn at random from `model.scratch`.
"""

import dataclasses
import filecmp
import zlib
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax import config, models, ops, parallel, processes, programs
from rlhf_jax.algorithms import ALGORITHMS, OFFLINE, training
from rlhf_jax.data.corpus import run_tokenizer
from rlhf_jax.data.table import purpose_of
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.data.vocabulary import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.leaves import named_leaves
from rlhf_jax.models import lora, roles
from rlhf_jax.models.save import whole_or_nothing
from rlhf_jax.types import Calibration, Model, Params, join

T = TypeVar("T", bound=config.Run)


class Loaded(NamedTuple):
    """A model with its weights."""

    spec: models.Spec
    part: programs.Part  # functions, and shapes with shardings
    params: Params  # what is trained (of a frozen model: everything)
    base: Params | None = None  # the frozen tree under an adapter
    calibration: Calibration = Calibration()
    source: Path | None = None  # directory it was read from
    name: str | None = None  # what the run calls that: a hub name, or the directory
    lora: config.Lora | None = None  # what made the adapter

    @property
    def model(self) -> Model:
        return self.part.model


def algorithm(stage: str, run: config.OnlineRun) -> training.Algorithm:
    """The online algorithm of a run: its settings are the group named like the stage."""
    return ALGORITHMS[stage](getattr(run, stage))


def offline_algorithm(stage: str, run: config.Run) -> training.Offline:
    """The offline algorithm of a run."""
    return OFFLINE[stage](getattr(run, {"reward": "reward_model"}.get(stage, stage), None))


def dtype(name: str) -> Any:
    return jnp.dtype({"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name])


def root_key(run: config.Run, purpose: str) -> jax.Array:
    """The root of one kind of randomness of a run: independent of all others."""
    return jax.random.fold_in(jax.random.key(run.seed), zlib.crc32(purpose.encode()))


def for_mesh(run: T, mesh: Mesh) -> T:
    """The run with what its file leaves to the machine: the cache of a CPU holds the logits of 16 positions."""
    if run.model.logprob_chunk is not None:
        return run
    chunk = 16 if mesh.devices.flat[0].platform == "cpu" else ops.CHUNK
    return dataclasses.replace(run, model=dataclasses.replace(run.model, logprob_chunk=chunk))


def tokenizer_for(stage: str, run: config.Run) -> Tokenizer:
    """The tokenizer of a run. The same data trains the same one, so a continued run makes it again."""
    return run_tokenizer(run.model, run.data, purpose_of(stage, run.data), seed=run.seed)


def stop_ids(sampling: config.Sampling, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's, generation_config's, and sampling.stop."""
    return tuple(dict.fromkeys([*tokenizer.eos_ids, *(tokenizer.token_id(text) for text in sampling.stop)]))


# ---------------------------------------------------------------------------------------------------- models


def make_model(settings: config.Model, spec: models.Spec, mesh: Mesh) -> Model:
    """The functions of an architecture as a run wants them computed."""
    compute_dtype = dtype(settings.compute_dtype)
    return models.make_model(
        spec,
        compute_dtype=compute_dtype,
        remat=settings.remat,
        attention=settings.attention,
        constrain=parallel.make_constrain(mesh),
        by_rows=parallel.make_by_rows(mesh, compute_dtype),
        mesh=mesh,
        lora_scale=_scale(settings.lora),
    )


def _scale(settings: config.Lora | None) -> float:
    return 1.0 if settings is None else settings.alpha / settings.rank


def read_spec(settings: config.Model, path: str | None, real_vocab: int | None, *, length: int | None = None) -> models.Spec:
    """The architecture: of a directory or of model.scratch; with `length`, ropes are those of sequences of so many tokens."""
    if path is not None:
        spec = models.read_spec(path, real_vocab=real_vocab)
        return spec if length is None else models.at_fixed_length(spec, length)
    if settings.scratch is None:
        raise UserError("model: give model.path (a Hugging Face directory) or model.scratch (random weights)")
    return models.scratch_spec(settings.scratch, real_vocab or settings.scratch.vocabulary)


def longest(run: config.Run) -> int:
    """Tokens of the longest sequence that a run's models see."""
    if not isinstance(run, config.OnlineRun):
        return run.data.max_tokens
    mixed = 0 if run.ptx_data is None else run.ptx_data.max_tokens
    return max(run.data.max_prompt_tokens + run.sampling.max_new_tokens, mixed)


def check_others(run: config.Run, tokenizer: Tokenizer) -> None:
    """Refuse what cannot stand beside the trained model; only config.json and tokenizer files are read.

    A reward model has a scalar head, a reference the architecture of the trained model, and all have the run's tokens: ids go
    from one model to the other. Raises: UserError.
    """
    others = {"reference": getattr(run, "reference", None), "critic": getattr(run, "critic", None)}
    others["reward.model"] = run.reward.model if isinstance(run, config.OnlineRun) else None
    for key, path in others.items():
        if path is None or lora.is_adapter(path):
            continue
        if key == "reward.model":
            check_scores(path, f"{key}={path}")
        if key == "reference":
            found, ours = (read_spec(run.model, each, tokenizer.vocab_size) for each in (path, run.model.path))
            _check_same_architecture(found, ours, path)
        _check_same_tokens(key, models.find(path), tokenizer)


def check_scores(path: str | Path, name: str) -> None:
    """Raise UserError for a language model where a reward model is wanted; `name` is what the message calls it."""
    if not models.has_scalar_head(path):
        raise UserError(f"{name}: is a language model, which gives no scores; name a reward model (`rlhf-jax reward` trains one)")


def _check_same_architecture(found: models.Spec, wanted: models.Spec, path: str) -> None:
    ours, theirs = (dataclasses.replace(spec, real_vocab=None, model_type="", max_length=0) for spec in (wanted, found))
    names = [field.name for field in dataclasses.fields(ours) if field.compare]
    wrong = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    if wrong:
        raise UserError(
            f"reference={path}: its architecture is not the model's ({', '.join(wrong)} differ); the reference must be a copy of "
            "the model before training, or a model of its kind"
        )


def _check_same_tokens(key: str, directory: Path, tokenizer: Tokenizer) -> None:
    file, own = directory / "tokenizer.json", tokenizer.source / "tokenizer.json" if tokenizer.source else None
    if not file.is_file() or (own is not None and own.is_file() and filecmp.cmp(file, own, shallow=False)):
        return
    theirs = {number: text for text, number in load_tokenizer(directory).backend.get_vocab().items()}
    ours = {number: text for text, number in tokenizer.backend.get_vocab().items() if number != tokenizer.pad_id}
    wrong = sorted(number for number, text in ours.items() if theirs.get(number) != text)
    if wrong:
        number = wrong[0]
        remedy = f"; or give reward.url, which sends texts: rlhf-jax serve {directory}" if key == "reward.model" else ""
        raise UserError(
            f"{key}={directory}: has another tokenizer than the model: {len(wrong)} of {len(ours)} tokens differ, the first is "
            f"{number}, {ours[number]!r} for the model and {theirs.get(number)!r} here; name one with the same tokens{remedy}"
        )


def check_mesh(spec: models.Spec, mesh: Mesh) -> None:
    """Refuse a mesh that does not divide width, heads, MLP and vocabulary: what it does not divide would be whole everywhere."""
    sizes = {"width": ("embed", spec.width), "attention heads": ("heads", spec.heads), "MLP width": ("mlp", spec.mlp_width)}
    parallel.check_divides(mesh, sizes | {"vocabulary": ("vocab", spec.vocab_size)})


def widest_mesh(path: str | Path, devices: list[Any] | None = None) -> config.Mesh:
    """The mesh of all devices, or of those given, for a model's directory alone: `parallel.spread`."""
    return parallel.spread(models.read_spec(path).width, len(jax.devices() if devices is None else devices))


def abstract_part(settings: config.Model, spec: models.Spec, mesh: Mesh, *, head: str, trained: bool) -> programs.Part:
    """A model as shapes: nothing is read.

    Args:
      head: "lm", "score" or "value".
      trained: an optimiser changes it: master weights in param_dtype, or an adapter over a base in compute_dtype.
    """
    model = make_model(settings, spec, mesh)
    kept = dtype(settings.param_dtype if trained else settings.compute_dtype)
    if not trained or settings.lora is None:
        return programs.Part(model, programs.abstract_params(model, mesh, head=head, dtype=kept))
    whole = programs.abstract_params(model, mesh, head=head, dtype=dtype(settings.compute_dtype))
    adapter = jax.eval_shape(lambda: _adapter(settings, spec, jax.random.key(0), whole))
    adapter = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kept), adapter)
    return programs.Part(model, programs.placed(model, mesh, adapter), lora.frozen_part(whole))


def load(
    settings: config.Model,
    mesh: Mesh,
    *,
    head: str,
    key: jax.Array | None,
    real_vocab: int | None,
    path: str | None,
    trained: bool = True,
    base: Params | None = None,
    zero_head: bool = False,
    adapter: str | None = None,
    length: int | None = None,
) -> Loaded:
    """A model with weights, each tensor read straight onto its shards; drawn at random where `path` is None.

    Args:
      head: "lm", "score" or "value"; a head that the directory lacks is drawn at random (zero with zero_head).
      key: of what is drawn: random weights, a new head, an adapter; None: a directory that lacks the head is refused.
      trained: as in `abstract_part`.
      base: the frozen tree of another model of the same architecture, shared instead of loaded again (LoRA).
      adapter: directory in PEFT layout: what the adapter (and a scalar head in it) begins with.
      length: as in `read_spec`: a run's `longest`.
    """
    spec = read_spec(settings, path, real_vocab, length=length)
    check_mesh(spec, mesh)
    part = abstract_part(settings, spec, mesh, head=head, trained=trained)
    model, adapted = part.model, trained and settings.lora is not None
    kept = dtype(settings.compute_dtype if adapted or not trained else settings.param_dtype)
    whole = programs.abstract_params(model, mesh, head=head, dtype=kept)
    calibration, source = Calibration(), None
    if path is None:
        init = parallel.compile_step(lambda k: _cast(model.init(k, head=head), kept), out=programs.shardings(whole))
        params = init(key)
    else:
        found = models.load_checkpoint(
            path, head=head, key=key, zero_head=zero_head, shardings=programs.shardings(whole), param_dtype=kept
        )
        params, calibration, source = found.params, found.calibration, found.source
    if not adapted:
        return Loaded(spec, part, params, None, calibration, source, path)
    frozen = lora.frozen_part(params) if base is None else base
    make = parallel.compile_step(
        lambda k, p: _cast(_adapter(settings, spec, k, p), dtype(settings.param_dtype)), out=programs.shardings(part.trained)
    )
    fresh = make(key, params)
    if adapter is not None:
        fresh = _begin_with(settings, spec, adapter, head, fresh)
    return Loaded(spec, part, fresh, frozen, calibration, source, path, settings.lora)


def begun_with(trained: Loaded) -> Loaded:
    """The adapter that training begins with, a copy on the same base: the reference of a run that goes on with an adapter."""
    return trained._replace(params=jax.tree.map(jnp.copy, trained.params))


def load_on(settings: config.Model, mesh: Mesh, actor: Loaded, *, head: str, path: str) -> Loaded:
    """A frozen model that is an adapter in PEFT layout on the actor's own base: the base stays the one copy in memory."""
    found = lora.load_adapter(path, actor.spec, head=head)
    if actor.base is None or actor.name is None or Path(found.base or "").resolve() != Path(actor.name).resolve():
        raise UserError(
            f"{path}: is an adapter of {found.base}; to share the actor's base give model.lora and model.path={found.base}, "
            "else give the directory of the merged model"
        )
    if "score" not in found.params:
        raise UserError(f"{path}: an adapter without a scalar head; it is no reward model")
    part = abstract_on(settings, mesh, actor.spec, actor.part, head=head, path=path)
    params = _placed(_scaled(found, settings), part.trained)
    return Loaded(actor.spec, part, params, actor.base, found.calibration, Path(path), path, settings.lora)


def abstract_on(
    settings: config.Model, mesh: Mesh, spec: models.Spec, actor: programs.Part, *, head: str, path: str
) -> programs.Part:
    """`load_on` as shapes."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype(settings.compute_dtype)),
        lora.load_adapter(path, spec, head=head).params,
    )
    return programs.Part(actor.model, programs.placed(actor.model, mesh, shapes), actor.frozen)


def _scaled(found: lora.Adapter, settings: config.Model) -> Params:
    """The adapter's arrays for the scale alpha / rank of this run."""
    ratio = found.scale / _scale(settings.lora)
    return jax.tree_util.tree_map_with_path(lambda at, x: x * ratio if at[-1].key == "lora_b" else x, found.params)


def _placed(params: Params, like: Params) -> Params:
    """Host arrays with the types and shardings of a tree like theirs."""
    return jax.tree.map(lambda new, old: parallel.place(np.asarray(new, old.dtype), old.sharding), params, like)


def _begin_with(settings: config.Model, spec: models.Spec, path: str, head: str, fresh: Params) -> Params:
    """A new adapter, replaced by the one in a directory; a critic takes a reward model's head and calibration over."""
    found = lora.load_adapter(path, spec, head=head)
    params = _scaled(found, settings)
    if head == "value" and "score" in params:
        params["score"] = roles.critic(spec, params, found.calibration)["score"]
    want, have = ({name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in (fresh, params))
    wrong = [name for name in sorted(want | have) if want.get(name) != have.get(name) and (name in have or "score" not in name)]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{path}: the adapter's rank or targets are not those of model.lora ({name} has shape {have.get(name)}, "
            f"this run's {want.get(name)}); give its own rank and targets"
        )
    return _placed(join(jax.tree.map(parallel.fetch, fresh), params), fresh)


def _cast(tree: Params, to: Any) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(to), tree)


def _adapter(settings: config.Model, spec: models.Spec, key: jax.Array, params: Params) -> Params:
    """The adapter, and the scalar head where there is one: both are trained."""
    if settings.lora is None:
        raise ValueError("an adapter needs model.lora")
    return lora.init(spec, settings.lora, key) | {name: params[name] for name in ("score",) if name in params}


def export(
    out: Path, loaded: Loaded, params: Params, *, head: str, tokenizer: Any, calibration: Calibration | None = None
) -> None:
    """Write a model as a Hugging Face directory: weights (adapters merged), configuration, tokenizer, generation config.

    An adapter is written by itself too, below `out/adapter` in PEFT layout. Where process 0 cannot write, all raise `UserError`.
    """
    merged = params if loaded.base is None else lora.merge(loaded.base, params, scale=_scale(loaded.lora))
    kept = calibration or loaded.calibration

    def save_model() -> None:
        about: dict[str, Any] = {"source": loaded.source, "tokenizer": tokenizer, "calibration": kept}
        models.save_checkpoint(out, loaded.spec, merged, head=head, **about)

    def save_adapter() -> None:
        if loaded.base is None or loaded.lora is None or not lora.has_layout(loaded.spec, params):
            return
        about: dict[str, Any] = {"base": loaded.name, "calibration": None if head == "lm" else kept}
        with whole_or_nothing(out, out, sum(leaf.nbytes for leaf in jax.tree.leaves(params))):
            lora.save_adapter(out / "adapter", loaded.spec, params, loaded.lora, head=head, **about)

    processes.together(save_model)
    processes.together(save_adapter)
