"""From a run file to what the loops hold: tokenizer, models on the mesh, algorithm, programs.

Every model has two trees: what is trained and what is frozen beneath it (the base under a LoRA adapter). Weights are read from
Hugging Face directories straight onto their shardings, or drawn at random from `model.scratch`.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import config, models, parallel, programs
from rlhf_jax.algorithms import ALGORITHMS, OFFLINE, training
from rlhf_jax.data.corpus import run_tokenizer
from rlhf_jax.data.table import purpose_of
from rlhf_jax.data.vocabulary import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.types import Calibration, Model, Params


class Loaded(NamedTuple):
    """A model with its weights."""

    spec: models.Spec
    part: programs.Part  # functions, and shapes with shardings
    params: Params  # what is trained (of a frozen model: everything)
    base: Params | None = None  # the frozen tree under an adapter
    calibration: Calibration = Calibration()
    source: Path | None = None  # directory it was read from
    lora_scale: float = 1.0

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


def tokenizer_for(stage: str, run: config.Run) -> Tokenizer:
    """The tokenizer of a run. The same data trains the same one, so a continued run makes it again."""
    return run_tokenizer(run.model, run.data, purpose_of(stage, run.data), seed=run.seed)


# ---------------------------------------------------------------------------------------------------- models


def make_model(settings: config.Model, spec: models.Spec, mesh: Mesh) -> Model:
    """The functions of an architecture as a run wants them computed."""
    return models.make_model(
        spec,
        compute_dtype=dtype(settings.compute_dtype),
        remat=settings.remat,
        attention=settings.attention,
        constrain=parallel.make_constrain(mesh),
        lora_scale=_lora_scale(settings),
    )


def _lora_scale(settings: config.Model) -> float:
    return 1.0 if settings.lora is None else settings.lora.alpha / settings.lora.rank


def read_spec(settings: config.Model, path: str | None, real_vocab: int | None) -> models.Spec:
    """The architecture: of a directory, of a public model known by name, or of model.scratch."""
    if path is not None:
        return models.read_spec(path, real_vocab=real_vocab)
    if settings.scratch is None:
        raise UserError("model: give model.path (a Hugging Face directory) or model.scratch (random weights)")
    return models.scratch_spec(settings.scratch, real_vocab or settings.scratch.vocabulary)


def check_mesh(spec: models.Spec, mesh: Mesh) -> None:
    """Refuse a mesh that does not divide heads, MLP and vocabulary."""
    sizes = {"attention heads": ("heads", spec.heads), "MLP width": ("mlp", spec.mlp_width)}
    parallel.check_divides(mesh, sizes | {"vocabulary (pad it)": ("vocab", spec.vocab_size)})


def abstract_part(
    settings: config.Model, spec: models.Spec, mesh: Mesh, *, head: str, trained: bool, optimised: bool = True
) -> programs.Part:
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
    key: jax.Array,
    real_vocab: int | None,
    path: str | None,
    trained: bool = True,
    base: Params | None = None,
    zero_head: bool = False,
) -> Loaded:
    """A model with weights, each tensor read straight onto its shards; drawn at random where `path` is None.

    Args:
      head: "lm", "score" or "value"; a head that the directory lacks is drawn at random (zero with zero_head).
      key: of what is drawn: random weights, a new head, an adapter.
      trained: as in `abstract_part`.
      base: the frozen tree of another model of the same architecture, shared instead of loaded again (LoRA).
    """
    spec = read_spec(settings, path, real_vocab)
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
        params, calibration, source = found.params, found.calibration, Path(path)
    if not adapted:
        return Loaded(spec, part, params, None, calibration, source)
    frozen = lora.frozen_part(params) if base is None else base
    adapter = parallel.compile_step(
        lambda k, p: _cast(_adapter(settings, spec, k, p), dtype(settings.param_dtype)), out=programs.shardings(part.trained)
    )
    return Loaded(spec, part, adapter(key, params), frozen, calibration, source, _lora_scale(settings))


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
    """Write a model as a Hugging Face directory: weights (adapters merged), configuration, tokenizer, generation config."""
    merged = params if loaded.base is None else lora.merge(loaded.base, params, scale=loaded.lora_scale)
    models.save_checkpoint(
        out,
        loaded.spec,
        merged,
        head=head,
        source=loaded.source,
        tokenizer=tokenizer,
        calibration=calibration or loaded.calibration,
    )
