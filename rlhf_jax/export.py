"""A run or one of its checkpoints as a Hugging Face directory."""

import json
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import build, checkpoint, config, config_file, integrity, metrics, models, parallel, rundir, setups, shelf
from rlhf_jax.errors import UserError
from rlhf_jax.leaves import nest
from rlhf_jax.models import lora
from rlhf_jax.types import Calibration

RESOLVED = "config.resolved.yaml"


def export(source: Path, out: Path, *, part: str = "model") -> Path:
    """Write the model of a run's newest good checkpoint, or of the checkpoint that `source` is.

    Args:
      source: directory of a run, or of one checkpoint (`RUN/checkpoints/30`).
      out: directory to make; it must not exist. A reward model that is not the run's last has no calibration: scores are raw.
      part: "model" (what the stage trains), "critic" or "ema" of an online run.
    Raises:
      UserError: no such run or checkpoint, a damaged one, or the part is not in it.
    """
    if out.exists():
        raise UserError(f"{out} exists already; name a directory that does not")
    run_dir, saved = locate(source)
    found = integrity.problems(saved)
    if found:
        raise UserError(f"{saved} is damaged: {found[0]}; choose an older checkpoint")
    stage = metrics.read_summary(run_dir).get("stage") or config_file.stage_of(run_dir / RESOLVED)
    if stage not in config.STAGES:
        raise UserError(
            f"{run_dir}: a run of {stage!r}, which is none of {', '.join(config.STAGES)}: {run_dir / 'final'} is its export; "
            "for another of its checkpoints call rlhf_jax.export.export in the program that adds this algorithm"
        )
    settings: Any = config_file.load(run_dir / RESOLVED, (), config.STAGES[stage])
    arrays = nest(checkpoint.read(saved))
    states = {"model": arrays.get("actor") or arrays.get("trained"), "critic": arrays.get("critic")}
    trees = {name: state["params"] for name, state in states.items() if state}
    if arrays.get("ema"):
        trees["ema"] = jax.tree.map(lambda x, like: x.astype(like.dtype), arrays["ema"], trees["model"])
    if part not in trees:
        raise UserError(f"{saved} holds no {part}; it has: {', '.join(trees)}")
    params = trees[part]
    head = "value" if part == "critic" else setups.HEADS.get(stage, "lm")
    tokenizer = build.tokenizer_for(stage, settings)
    mesh = parallel.make_mesh(config.Mesh(), jax.local_devices()[:1])
    path = settings.model.path
    if part == "critic":
        given = settings.critic or settings.reward.model
        path = path if given is None or lora.is_adapter(given) else given
    if settings.model.lora is None:
        spec = build.read_spec(settings.model, path, tokenizer.vocab_size)
        loaded = build.Loaded(
            spec, build.abstract_part(settings.model, spec, mesh, head=head, trained=True), params,
            source=None if path is None else models.find(path), name=path,
        )  # fmt: skip
    else:
        key = build.root_key(settings, "model")
        loaded = build.load(settings.model, mesh, head=head, key=key, real_vocab=tokenizer.vocab_size, path=path)
    build.export(out, loaded, params, head=head, tokenizer=tokenizer, calibration=_calibration(run_dir, saved, stage))
    return out


def _calibration(run_dir: Path, saved: Path, stage: str) -> Calibration:
    """Of a reward model: what the run measured when it was done, where this is the state it was measured with."""
    record = rundir.read_record(run_dir) if stage == "reward" else None
    measured = run_dir / "final" / "config.json"
    if record is None or str(record["completed_step"]) != saved.name or not measured.is_file():
        return Calibration()
    found = json.loads(measured.read_bytes())
    return Calibration(float(found["mean"]), float(found["std"]))


def locate(source: Path) -> tuple[Path, Path]:
    """A run or a checkpoint -> the run's directory and the checkpoint's."""
    if (source / shelf.MARKER).is_file():
        return source.parent.parent, source
    steps = checkpoint.Checkpoints(source / "checkpoints").steps() if (source / "checkpoints").is_dir() else []
    if not steps or not (source / RESOLVED).is_file():
        raise UserError(f"{source}: neither a run with checkpoints nor a checkpoint; name RUN or RUN/checkpoints/STEP")
    return source, source / "checkpoints" / str(steps[-1])
