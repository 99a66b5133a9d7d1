"""Hugging Face directory -> parameters, tensor by tensor straight onto their shards."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.hub import find
from rlhf_jax.models import directory as dirs
from rlhf_jax.models import safetensors_file as st
from rlhf_jax.models.families import family_of, spec_of
from rlhf_jax.models.heads import draw_head
from rlhf_jax.models.rules import Family, Part, Stored, stored_tensors
from rlhf_jax.models.spec import Leaf, Spec, leaves
from rlhf_jax.types import Calibration, Params

WRAPPERS = ("rwtransformer.", "pretrained_model.", "module.")  # what other trainers put before every name
HEADS = ("score", "classifier", "value_head", "v_head.summary", "v_head")  # and how they call a scalar head
SCALAR = re.compile(rf"(?:{'|'.join(map(re.escape, HEADS))})\.(weight|bias)")
BUFFERS = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")
_ALIGNMENT = 64  # bytes; XLA takes a NumPy buffer so aligned without a copy


class Checkpoint(NamedTuple):
    """What a model directory holds."""

    spec: Spec
    params: Params
    calibration: Calibration  # of a reward model: score = (head - mean) / std
    tokens: dirs.Tokens
    dtype: str  # of the stored weights: "float32", "bfloat16", "float16"
    drawn: tuple[str, ...]  # parameters that the files lack and that were drawn at random (a new head)
    source: Path


def read_spec(path: str | Path, *, real_vocab: int | None = None) -> Spec:
    """The spec of a model directory; its weights are not touched.

    Raises:
        UserError: the architecture is not supported, needs code of its own, or lacks a key.
    """
    return spec_of(dirs.read_config(find(path)), real_vocab=real_vocab)


def has_scalar_head(path: str | Path) -> bool:
    """True for a reward model or a critic, which cannot answer: config.json names its class.

    Raises:
        UserError: there is no such directory, or no config.json in it.
    """
    classes = dirs.read_config(find(path)).get("architectures") or [""]
    return str(classes[0]).endswith(("ForSequenceClassification", "ForTokenClassification"))


def load_checkpoint(
    path: str | Path,
    *,
    head: str = "lm",
    key: jax.Array | None = None,
    zero_head: bool = False,
    shardings: Any = None,
    param_dtype: Any = jnp.float32,
    real_vocab: int | None = None,
) -> Checkpoint:
    """Read a model. Peak host memory: this process's own shards and one stored tensor.

    Args:
        head: "lm"; "score" (reward model, calibration apart); "value" (critic, calibration folded into its head); "none".
        key: draws the scalar head where the directory has none (critic or reward model from a language model).
        zero_head: such a head is 0 instead.
        shardings: tree of shardings like the parameters, or function (abstract parameters) -> such a tree.
    Raises:
        UserError: nothing was loaded: tensors are missing, unexpected or of another shape (the first five are named), a file
            is truncated, the weights are pickles, or the tokenizer has more tokens than the embedding rows.
    """
    directory = find(path)
    config = dirs.read_config(directory)
    spec = spec_of(config, real_vocab=real_vocab)
    family = family_of(spec.model_type)
    tensors = dirs.Tensors(directory)
    wanted = stored_tensors(spec, family.rules(spec), "lm" if head == "lm" else "none")
    names, scalar = match(directory, spec, family, tensors, wanted, head)
    table = leaves(spec, head)
    if callable(shardings):
        shardings = shardings(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, param_dtype), table, is_leaf=_is_leaf))
    sources = _sources(wanted, names)
    trunk = {name: value for name, value in table.items() if name != "score"}
    params = _read(trunk, (), sources, tensors, shardings, np.dtype(param_dtype))
    pad_id = (config.get("text_config") or config).get("pad_token_id")
    calibration = Calibration(float(config.get("mean") or 0.0), float(config.get("std") or 1.0), pad_id)
    if "score" in table:
        if "weight" in scalar:
            values, calibration = _scalar_head(tensors, scalar, spec, head, calibration)
        elif key is not None or zero_head:
            values, calibration = draw_head(spec, head, key, zero=zero_head), Calibration()
        else:
            looked = ", ".join(f"{name}.weight" for name in HEADS)
            raise UserError(f"{directory}: has no scalar head (looked for {looked}); it is a language model, not a {head} model")
        values = {name: value.astype(param_dtype) for name, value in values.items()}
        params["score"] = {n: _place(v, None if shardings is None else shardings["score"][n]) for n, v in values.items()}
    drawn = ("score",) if "score" in table and "weight" not in scalar else ()
    stored = {tensors.dtype(name) for name in names.values()}
    dtype = {"BF16": "bfloat16", "F16": "float16"}.get(next(iter(stored)), "float32") if len(stored) == 1 else "float32"
    return Checkpoint(spec, params, calibration, dirs.tokens(directory, config), dtype, drawn, directory)


def match(
    directory: Path, spec: Spec, family: Family, tensors: dirs.Tensors, wanted: dict[str, Stored], head: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Name in the rules -> name in the files, and the files' scalar head {"weight", "bias"}: all or a UserError."""
    language_head = _language_head(spec, family)
    names, scalar, extra = {}, {}, []
    for name in tensors.place:
        known = canonical(name, family, wanted)
        found = SCALAR.fullmatch(known)
        if known in wanted:
            names[known] = name
        elif found and (head != "lm" or known.startswith(("v_head", "value_head"))):
            scalar[found[1]] = name
        elif not (known in language_head or _ignored(name, family) or _ignored(known, family)):
            extra.append(name)
    missing = [name for name in wanted if name not in names]
    wrong = [n for n in names if tensors.shape(names[n]) != wanted[n].shape or tensors.dtype(names[n]) not in st.WEIGHTS]
    problems = [
        _some("missing", [f"{name} {list(wanted[name].shape)}" for name in missing]),
        _some("unexpected", [f"{name} {list(tensors.shape(name))}" for name in sorted(extra)]),
        _some(
            "of the wrong shape or type",
            [
                f"{names[n]} {list(tensors.shape(names[n]))} {tensors.dtype(names[n])} (must be {list(wanted[n].shape)})"
                for n in wrong
            ],
        ),
    ]
    if any(problems):
        hint = ""
        if missing and all(name in language_head for name in missing):
            hint = "; tie_word_embeddings is false, so the output matrix must be there"
        raise UserError(
            f"{directory}: tensors do not fit config.json ({spec.model_type}): {'; '.join(filter(None, problems))}{hint}. "
            "Nothing was loaded; download the model again, or correct config.json"
        )
    return names, scalar


def canonical(name: str, family: Family, wanted: Iterable[str]) -> str:
    """The name as the family's rules spell it."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    for theirs, ours in family.renamed:
        if name.startswith(theirs):
            name = ours + name[len(theirs) :]
            break
    return family.prefix + name if name not in wanted and family.prefix + name in wanted else name


def _language_head(spec: Spec, family: Family) -> set[str]:
    """Names of the output matrix: stored although it is tied, or not wanted."""
    rules = family.rules(spec)
    return {rule.theirs for rule in rules if rule.parts[0][0].startswith("head/")}


def _ignored(name: str, family: Family) -> bool:
    return any(re.search(pattern, name) for pattern in BUFFERS) or is_foreign(name, family)


def is_foreign(name: str, family: Family) -> bool:
    """True for tensors of another tower than the text model's."""
    return any(re.match(pattern, name) for pattern in family.ignored)


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} {what}: {', '.join(names[:5])}{more}"


# ------------------------------------------------------------------------------------------------------- reading


def _sources(wanted: dict[str, Stored], names: dict[str, str]) -> dict[tuple[str, ...], dict[tuple[int, ...], tuple[str, Part]]]:
    """Leaf -> leading index -> stored tensor and the part of it."""
    found: dict[tuple[str, ...], dict] = {}
    for name, stored in wanted.items():
        for part in stored.parts:
            found.setdefault(part.leaf, {})[part.index] = (names[name], part)
    return found


def _read(table: Any, path: tuple, sources: dict, tensors: dirs.Tensors, shardings: Any, dtype: np.dtype) -> Any:
    if not _is_leaf(table):
        return {
            name: _read(value, (*path, name), sources, tensors, None if shardings is None else shardings[name], dtype)
            for name, value in table.items()
        }
    if path not in sources:
        raise ValueError(f"no rule of this family fills {'/'.join(path)}")

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return _fill(table.shape, index, sources[path], tensors, dtype)

    if shardings is None:
        return jax.device_put(shard(tuple(slice(0, n) for n in table.shape)))
    return assemble(table.shape, shardings, shard)


def assemble(shape: tuple[int, ...], sharding: jax.sharding.Sharding, shard: Any) -> jax.Array:
    """A global array from `shard(index)`, asked once for every distinct index of this process."""
    pieces: dict[tuple, np.ndarray] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index or (), shape, strict=True))
        key = tuple((s.start, s.stop) for s in index)
        if key not in pieces:
            pieces[key] = shard(index)
        arrays.append(jax.device_put(pieces[key], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _fill(shape: tuple, index: tuple[slice, ...], source: dict, tensors: dirs.Tensors, dtype: np.dtype) -> np.ndarray:
    """One shard of a leaf, out of one stored tensor for every layer (and expert)."""
    out = _aligned(tuple(s.stop - s.start for s in index), dtype)
    lead = len(next(iter(source)))
    for at in itertools.product(*(range(s.start, s.stop) for s in index[:lead])):
        name, part = source[at]
        target = out[tuple(i - s.start for i, s in zip(at, index, strict=False))]
        view = part.view(tensors.array(name))
        if view.shape != shape[lead:]:
            # Heads that the file groups: whole, their dims merge in the order of ours; of a shard they must be merged first.
            whole = target.shape == shape[lead:]
            target, view = (target.reshape(view.shape), view) if whole else (target, view.reshape(shape[lead:]))
        np.copyto(target, view if target.shape == view.shape else view[index[lead:]], casting="unsafe")
        tensors.release(name)
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that XLA's CPU client can take as it is."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def _place(value: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(value)
    return assemble(value.shape, sharding, lambda index: value[index])


def _scalar_head(
    tensors: dirs.Tensors, names: dict[str, str], spec: Spec, head: str, calibration: Calibration
) -> tuple[dict[str, np.ndarray], Calibration]:
    """Kernel f32[D, 1] (and bias f32[1]) of a stored reward model or critic, and what is left of the calibration."""
    shape = tensors.shape(names["weight"])
    if shape != (1, spec.head_width):
        raise UserError(
            f"{names['weight']} has shape {list(shape)}; a reward model or critic has one output, [1, {spec.head_width}]"
        )
    kernel = np.asarray(tensors.array(names["weight"]), np.float32).T
    bias = float(np.asarray(tensors.array(names["bias"]), np.float32)[0]) if "bias" in names else 0.0
    if head == "score":  # (w h + b - mean) / std: the bias belongs to the calibration, a reward model's head has none
        return {"kernel": kernel}, calibration._replace(mean=calibration.mean - bias)
    bias = np.asarray([(bias - calibration.mean) / calibration.std], np.float32)
    return {"kernel": kernel / np.float32(calibration.std), "bias": bias}, Calibration()
