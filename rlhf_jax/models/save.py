"""Parameters -> a directory that transformers, vLLM and SGLang load. All or nothing, one tensor in memory at a time."""

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from rlhf_jax.errors import UserError
from rlhf_jax.models import directory as dirs
from rlhf_jax.models import safetensors_file as st
from rlhf_jax.models.export_config import export_config
from rlhf_jax.models.families import family_of
from rlhf_jax.models.load import canonical, is_foreign
from rlhf_jax.models.rules import Family, Part, Stored, stored_tensors
from rlhf_jax.models.spec import Spec
from rlhf_jax.types import Calibration, Params

SHARD_BYTES = 5_000_000_000
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Tokenizer(Protocol):
    """What is needed of a tokenizer; `data.tokenizer.Tokenizer` is one."""

    bos_id: int | None
    pad_id: int
    eos_ids: tuple[int, ...]

    def save(self, directory: Path) -> None: ...


def save_checkpoint(
    path: str | Path,
    spec: Spec,
    params: Params,
    *,
    head: str = "lm",
    source: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    storage_dtype: str | None = None,
    calibration: Calibration | None = None,
    generation_config: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model directory: written beside its place and renamed, so that it is whole or not there.

    Args:
        params: whole (adapters merged). Every process calls this; the first one writes, and raises alone where it cannot.
        head: "lm", "score" (reward model, `calibration` kept in config.json) or "value" (critic).
        source: directory that the model came from: generation config, tokenizer files without a `tokenizer`, other towers.
        storage_dtype: "float32", "float16" or "bfloat16"; default: each tensor's own in the source's files, and for what
            they lack (a new head) that of most weights; without such files config.json's, else float32.
        generation_config: keys that replace those of the source.
    Raises:
        UserError: the directory holds something that is not a model, or cannot be made.
    """
    path = Path(path)
    _refuse_foreign(path)
    source = None if source is None else Path(source)
    stored, usual = ({}, None) if storage_dtype else _stored_dtypes(spec, source)
    dtype = storage_dtype or usual or _origin_dtype(spec)
    if dtype not in DTYPES:
        raise UserError(f"storage dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    pad_id = None if tokenizer is None else tokenizer.pad_id
    # Of every head: the tokens that end an answer are read from it, and a reward model reads the last one.
    generation = _generation(source, json.loads(spec.origin), tokenizer) | (generation_config or {})
    eos = generation.get("eos_token_id")
    config = export_config(spec, head, dtype, pad_id=pad_id, eos=eos, calibration=calibration or Calibration())
    writer = jax.process_index() == 0
    temporary = path.with_name(f".{path.name}.partial")
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) * DTYPES[dtype].itemsize
    with _left_together(f"saved {path}"), whole_or_nothing(path, temporary, size):
        _write_weights(temporary, spec, params, head, DTYPES[dtype], stored, _towers(spec, source), shard_bytes, writer)
        if writer:
            _write_json(temporary / "config.json", config)
            _write_json(temporary / "generation_config.json", generation)
            if tokenizer is not None:
                tokenizer.save(temporary)
            elif source is not None:
                _copy_tokenizer(source, temporary)
            _replace(temporary, path)
    return path


@contextlib.contextmanager
def _left_together(name: str) -> Iterator[None]:
    """No process leaves the block before all do, be it by an error."""
    try:
        yield
    finally:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def whole_or_nothing(path: Path, written: Path, size: int) -> Iterator[None]:
    """An OSError in the block is one message about `path`, which needs `size` bytes, and removes the directory `written`."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(written, ignore_errors=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"free {1.05 * size / 1e6 + 1:.0f} MB and give the same command again" if full else "name another place"
        raise UserError(
            f"{path}: cannot be written there ({error.strerror}: {error.filename2 or error.filename or written}); {remedy}"
        ) from error


# ------------------------------------------------------------------------------------------------------- weights


def _write_weights(
    directory: Path,
    spec: Spec,
    params: Params,
    head: str,
    usual: np.dtype,
    dtypes: dict[str, np.dtype],
    towers: dirs.Tensors | None,
    shard_bytes: int,
    writer: bool,
) -> None:
    family = family_of(spec.model_type)
    plan: dict[str, Stored | str] = dict(stored_tensors(spec, family.rules(spec), "lm" if head == "lm" else "none"))
    shapes: dict[str, Any] = {name: (s.shape, dtypes.get(name, usual)) for name, s in plan.items() if isinstance(s, Stored)}
    if head != "lm":
        own = scalar_name(family, head)
        for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
            if leaf in params["score"]:
                name, shape = f"{own}.{suffix}", params["score"][leaf].shape[::-1]
                plan[name] = Stored(shape, (Part(("score", leaf), (), np.transpose),), None)
                shapes[name] = (shape, dtypes.get(name, usual))
    for name in towers.place if towers is not None else ():
        if is_foreign(name, family):
            plan[name] = name
            shapes[name] = (towers.shape(name), st.DTYPES[towers.dtype(name)])
    files = list(st.shard(dict(sorted(shapes.items())), shard_bytes))
    names = [dirs.SINGLE] if len(files) == 1 else [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    contents = [_tensors(part, plan, params, towers) for part in files]
    try:
        if writer:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            for name, part, tensors in zip(names, files, contents, strict=True):
                st.write(directory / name, part, tensors)
    finally:
        if jax.process_count() > 1:  # the gathers inside are collective: what this process does not write, the others wait for
            for _ in itertools.chain.from_iterable(contents):
                pass
    if writer and len(files) > 1:
        total = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
        weight_map = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
        _write_json(directory / dirs.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(shapes: dict, plan: dict, params: Params, towers: dirs.Tensors | None) -> Iterator[tuple[str, np.ndarray]]:
    for name, (shape, dtype) in shapes.items():
        stored = plan[name]
        if isinstance(stored, str):
            yield name, towers.array(stored)
            towers.release(stored)
            continue
        out = np.empty(shape, dtype)
        for part in stored.parts:
            leaf = params
            for key in part.leaf:
                leaf = leaf[key]
            view = part.view(out)
            np.copyto(view, host(leaf[part.index] if part.index else leaf).reshape(view.shape), casting="unsafe")
        yield name, out


def scalar_name(family: Family, head: str) -> str:
    """What transformers calls the scalar head of a reward model or critic."""
    return family.value_name if head == "value" and family.value is not None else "score"


def host(x: Any) -> np.ndarray:
    """A whole array on the host, gathered where other processes hold parts of it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _towers(spec: Spec, source: Path | None) -> dirs.Tensors | None:
    """The source's tensors, where some of them (a vision tower) are passed on as they are."""
    if not family_of(spec.model_type).ignored:
        return None
    if source is None:
        raise UserError(f"a {spec.model_type} model is saved with the other towers of its source; the source directory is gone")
    return dirs.Tensors(source)


# --------------------------------------------------------------------------------------------------- other files


def _stored_dtypes(spec: Spec, source: Path | None) -> tuple[dict[str, np.dtype], str | None]:
    """Name in the rules -> dtype in the source's files, and the name of the dtype that most weights have; config.json may lie."""
    if source is None:
        return {}, None
    try:
        tensors = dirs.Tensors(source)
    except UserError:  # the files are gone since they were read
        return {}, None
    family, known = family_of(spec.model_type), {dtype: name for name, dtype in DTYPES.items()}
    wanted = stored_tensors(spec, family.rules(spec), "lm")
    found, weights = {}, Counter[str]()
    for name in tensors.place:
        dtype, ours = st.DTYPES.get(tensors.dtype(name)), canonical(name, family, wanted)
        if dtype in known:
            found[ours] = dtype
            weights[known[dtype]] += math.prod(tensors.shape(name)) if ours in wanted else 0
    return found, next((name for name, _ in weights.most_common(1)), None)


def _origin_dtype(spec: Spec) -> str:
    config = json.loads(spec.origin)
    text = config.get("text_config") or {}
    found = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "float32"
    name = str(found).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _generation(source: Path | None, config: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json: the source's, with all the tokens that end an answer."""
    path = None if source is None else source / "generation_config.json"
    found = dirs.read_json(path) if path is not None and path.is_file() else {}
    text = config.get("text_config") or config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: text[name] for name in names if text.get(name) is not None} | found
    if tokenizer is not None:
        eos = list(tokenizer.eos_ids)
        found |= {"eos_token_id": eos if len(eos) > 1 else eos[0], "pad_token_id": tokenizer.pad_id}
        if tokenizer.bos_id is not None:
            found["bos_token_id"] = tokenizer.bos_id
    return found


def _copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files as they are, but for a class name that transformers 4 refuses."""
    for name in dirs.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer_config.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _refuse_foreign(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise UserError(f"{path}: not empty, and no model that could be replaced; give another directory")


def _replace(temporary: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)
