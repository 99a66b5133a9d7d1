"""Low-rank adapters: y = x W + (alpha / rank) (x a) b, with a and b stacked like the kernels beside which they lie.

An adapter is a tree of its own, the only one that is trained; `types.join(base, adapter)` puts it beside the kernels and the
decoder applies what it finds there. The base alone is the reference. Source: arXiv 2106.09685.
"""

import json
import math
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import config as settings
from rlhf_jax.errors import UserError
from rlhf_jax.models import directory as dirs
from rlhf_jax.models import safetensors_file as st
from rlhf_jax.models.families import family_of
from rlhf_jax.models.load import canonical
from rlhf_jax.models.rules import Part, Stored, stored_tensors
from rlhf_jax.models.save import host, scalar_name
from rlhf_jax.models.spec import Leaf, Spec, leaves
from rlhf_jax.types import Calibration, Params, join

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
FILE, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# Keys of adapter_config.json that make another function of the same tensors, or belong to a base with other weights.
CHANGING = (
    *("use_dora", "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    *("monteclora_config", "target_parameters", "trainable_token_indices"),
)
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # how init_lora_weights begins where it takes from the base
CALIBRATION = "calibration.json"  # {"mean", "std"} of a reward model: PEFT's file has no place for it


class Adapter(NamedTuple):
    """An adapter read from a directory in PEFT layout."""

    params: Params
    scale: float  # what `make_model(lora_scale=...)` takes
    base: str | None = None  # name or directory of the model that it belongs to
    calibration: Calibration = Calibration()


def init(spec: Spec, lora: settings.Lora, key: jax.Array, *, dtype: Any = jnp.float32) -> Params:
    """A new adapter: a uniform in +-1 / sqrt(inputs), b zero, so that it changes nothing yet.

    Raises:
        UserError: a target is unknown, or the model has none of them.
    """
    unknown = [name for name in lora.targets if name not in TARGETS]
    if unknown:
        raise UserError(f"model.lora.targets: {unknown[0]!r} is not one of {', '.join(TARGETS)}")

    def walk(table: Any, path: tuple[str, ...]) -> Params:
        found: Params = {}
        for name, value in table.items():
            if name in lora.targets and isinstance(value.get("kernel"), Leaf):
                found[name] = pair(value["kernel"], (*path, name))
            elif not isinstance(value, Leaf) and (inner := walk(value, (*path, name))):
                found[name] = inner
        return found

    def pair(kernel: Leaf, path: tuple[str, ...]) -> Params:
        *lead, inputs, outputs = kernel.shape
        bound = 1 / math.sqrt(inputs)
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        a = jax.random.uniform(own, (*lead, inputs, lora.rank), minval=-bound, maxval=bound)
        return {"lora_a": a.astype(dtype), "lora_b": jnp.zeros((*lead, lora.rank, outputs), dtype)}

    layers = {name: value for name, value in leaves(spec, "none").items() if name.startswith("layers")}
    adapter = walk(layers, ())
    if not adapter:
        raise UserError(f"model.lora.targets: this {spec.model_type} model has none of {', '.join(lora.targets)}")
    return adapter


def frozen_part(params: Params) -> Params:
    """What lies still under an adapter: everything but the scalar head, which is trained with it."""
    return {name: value for name, value in params.items() if name != "score"}


def merge(base: Params, adapter: Params, *, scale: float) -> Params:
    """A whole model: every kernel that has an adapter becomes W + scale a b, summed in float32."""
    return _merged(join(base, adapter), scale)


def _merged(params: Params, scale: float) -> Params:
    if "lora_a" in params:
        kernel = params["kernel"]
        delta = jnp.einsum("...ir,...ro->...io", params["lora_a"].astype(jnp.float32), params["lora_b"].astype(jnp.float32))
        merged = (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
        return {"kernel": merged} | {name: value for name, value in params.items() if name == "bias"}
    return {name: _merged(value, scale) if isinstance(value, dict) else value for name, value in params.items()}


# ----------------------------------------------------------------------------------------------------- PEFT layout


def is_adapter(path: str | Path | None) -> bool:
    """True for a directory in PEFT layout."""
    return path is not None and (Path(path) / CONFIG).is_file()


def has_layout(spec: Spec, adapter: Params) -> bool:
    """False where PEFT has no layout for the adapter: experts that share one stored tensor (gpt-oss)."""
    return all(stored.inputs is not None for _, stored, _ in _adapted(spec, adapter))


def save_adapter(
    path: str | Path,
    spec: Spec,
    adapter: Params,
    lora: settings.Lora,
    *,
    base: str | None = None,
    head: str = "lm",
    calibration: Calibration | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT reads them. Every process calls this; the first writes.

    Where the files fuse matrices that we keep apart (GPT-2, NeoX, Falcon, Phi-3), their adapters become one of the summed
    rank with zeros off the diagonal blocks: the same function, declared in rank_pattern and alpha_pattern.

    Args:
        adapter: tree of lora_a and lora_b, and perhaps "score"; base: name or directory of the base model.
        calibration: of a reward model, written beside them.
    """
    adapter = jax.tree.map(host, adapter)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for name, stored, pairs in _adapted(spec, adapter):
        if stored.inputs is None:
            raise UserError(f"{name}: PEFT has no layout for adapters of experts that share a tensor; merge the adapter instead")
        module = name.removesuffix(".weight")
        a, b = _fuse(stored, pairs, lora.rank)
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
        if len(a) != lora.rank:
            ranks[module] = len(a)
    targets = _target_modules(spec, [name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors])
    own = scalar_name(family_of(spec.model_type), head)
    for name, value in adapter.get("score", {}).items():
        tensors[f"{PREFIX}{own}.{'weight' if name == 'kernel' else name}"] = np.ascontiguousarray(value.T, np.float32)
    content = {
        "peft_type": "LORA",
        "task_type": {"lm": "CAUSAL_LM", "score": "SEQ_CLS", "value": "TOKEN_CLS"}[head],
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": {module: lora.alpha * rank / lora.rank for module, rank in ranks.items()},
        "modules_to_save": [own] if "score" in adapter else None,
        "fan_in_fan_out": spec.model_type == "gpt2",
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    if jax.process_index():
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    st.write(path / FILE, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.items())
    (path / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if calibration is not None:
        (path / CALIBRATION).write_text(json.dumps({"mean": calibration.mean, "std": calibration.std}) + "\n", encoding="utf-8")


def _target_modules(spec: Spec, adapted: list[str]) -> list[str] | str:
    """What PEFT finds the adapted modules by: the ends of their names, or the whole where others end alike; no vision tower."""
    family = family_of(spec.model_type)
    ends = {name.rpartition(".")[2] for name in adapted}
    if family.prefix.startswith("language_model."):
        return rf".*language_model\..*\.({'|'.join(sorted(ends))})"
    stored = stored_tensors(spec, family.rules(spec), "none").items()
    others = {name.removesuffix(".weight") for name, found in stored if found.inputs is not None} - set(adapted)
    alike = ends & {name.rpartition(".")[2] for name in others}
    return sorted(ends - alike | {name for name in adapted if name.rpartition(".")[2] in alike})


def _adapted(spec: Spec, adapter: Params) -> list[tuple[str, Stored, list]]:
    """The stored matrices that have an adapter, each with the pairs (lora_a, lora_b or None) of its parts."""
    found = []
    for name, stored in stored_tensors(spec, family_of(spec.model_type).rules(spec), "none").items():
        pairs = [_find(adapter, part.leaf[:-1], part.index) for part in stored.parts]
        if stored.parts[0].leaf[-1] == "kernel" and any(pair is not None for pair in pairs):
            found.append((name, stored, pairs))
    return found


def _find(adapter: Params, path: tuple[str, ...], index: tuple[int, ...]) -> tuple[Any, Any] | None:
    for name in path:
        if name not in adapter:
            return None
        adapter = adapter[name]
    if "lora_a" not in adapter:
        return None
    return adapter["lora_a"][index], adapter["lora_b"][index]


def _fuse(stored: Stored, pairs: list, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """lora_A [ranks, in] and lora_B [out, ranks] of a stored matrix that holds one or several of ours."""
    axis = stored.inputs or 0
    inputs = stored.shape[axis]
    ranks = rank * len(pairs)
    a = np.zeros((ranks, inputs), np.float32)
    shape = list(stored.shape)
    shape[axis] = ranks
    b = np.zeros(shape, np.float32)
    for n, (part, pair) in enumerate(zip(stored.parts, pairs, strict=True)):
        if pair is not None:
            block = slice(n * rank, (n + 1) * rank)
            a[block] = pair[0].T
            view = part.view(b)[block]
            view[...] = pair[1].reshape(view.shape)
    return a, b if stored.inputs == 1 else np.ascontiguousarray(b.T)


def load_adapter(path: str | Path, spec: Spec, *, head: str = "lm", dtype: Any = jnp.float32) -> Adapter:
    """Read an adapter in PEFT layout. Matrices of smaller rank than others in their stack are filled up with zeros.

    Raises:
        UserError: a tensor does not belong to the model or has another shape, or the adapter is of a kind that is not LoRA.
    """
    directory = Path(path)
    found = dirs.read_json(directory / CONFIG)
    _check_plain(directory / CONFIG, found)
    if not (directory / FILE).is_file():
        raise UserError(f"{directory}: has no {FILE}; save the adapter as safetensors")
    reader = st.Reader(directory / FILE)
    family = family_of(spec.model_type)
    named = {canonical(name.removeprefix(PREFIX), family, ()): name for name in reader.entries}
    arrays = {name: reader.array(theirs).astype(np.float32) for name, theirs in named.items()}
    default = _scaling(found, None) or 1.0
    places: dict[tuple[str, ...], list[tuple[tuple[int, ...], np.ndarray, np.ndarray]]] = {}
    for name, stored in stored_tensors(spec, family.rules(spec), "none").items():
        module = name.removesuffix(".weight")
        a, b = arrays.get(f"{module}.lora_A.weight"), arrays.get(f"{module}.lora_B.weight")
        if a is None or b is None or stored.inputs is None:
            continue
        del arrays[f"{module}.lora_A.weight"], arrays[f"{module}.lora_B.weight"]
        inputs, outputs = stored.shape[stored.inputs], stored.shape[1 - stored.inputs]
        if a.shape != (len(a), inputs) or b.shape != (outputs, len(a)):
            raise UserError(
                f"{directory}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; "
                f"must be [rank, {inputs}] and [{outputs}, rank]"
            )
        theirs = named[f"{module}.lora_A.weight"].removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = b * (_scaling(found, theirs) / default)
        for part, a_own, b_own in _parts(stored, a, b if stored.inputs == 1 else b.T, found, module):
            places.setdefault(part.leaf[:-1], []).append((part.index, a_own.T, b_own))
    table, params = leaves(spec, head), {}
    for leaf, pairs in places.items():
        kernel, rank, (lead, _, _) = _leaf(table, (*leaf, "kernel")), max(a.shape[1] for _, a, _ in pairs), pairs[0]
        node = _node(params, leaf)
        node["lora_a"] = np.zeros((*kernel.shape[: len(lead)], kernel.shape[-2], rank), np.float32)
        node["lora_b"] = np.zeros((*kernel.shape[: len(lead)], rank, kernel.shape[-1]), np.float32)
        for index, a, b in pairs:
            node["lora_a"][index][:, : a.shape[1]] = a
            node["lora_b"][index][: len(b)] = b
    for name in [name for name in arrays if name.rpartition(".")[0] in ("score", "classifier")]:
        params.setdefault("score", {})["kernel" if name.endswith("weight") else "bias"] = arrays.pop(name).T
    if arrays:
        names = sorted(arrays)
        raise UserError(
            f"{directory}: {len(names)} tensors do not belong to this {spec.model_type} model: {', '.join(names[:5])}"
        )
    kept = directory / CALIBRATION
    calibration = Calibration(**dirs.read_json(kept)) if kept.is_file() else Calibration()
    return Adapter(
        jax.tree.map(lambda x: jnp.asarray(x, dtype), params), default, found.get("base_model_name_or_path"), calibration
    )


def _parts(stored: Stored, a: np.ndarray, b: np.ndarray, content: dict[str, Any], module: str) -> list[tuple[Part, Any, Any]]:
    """(part, A [rank, in], B [rank, out]) of what a stored matrix holds; what `_fuse` put together comes apart again."""
    views = [(part, a, part.view(b).reshape(len(a), -1)) for part in stored.parts]
    rank, number = content["r"], len(views)
    if number == 1 or not (content.get("rank_pattern") or {}).get(module) == len(a) == rank * number:
        return views
    blocks = [slice(n * rank, (n + 1) * rank) for n in range(number)]
    if any(np.any(np.delete(own, block, 0)) for (_, _, own), block in zip(views, blocks, strict=True)):
        return views
    found = [(part, a[block], own[block]) for (part, _, own), block in zip(views, blocks, strict=True)]
    return [entry for entry in found if np.any(entry[1])]


def _check_plain(file: Path, content: dict[str, Any]) -> None:
    """Raise `UserError` where an adapter is not W + alpha / rank A B on the weights of its base."""
    if content.get("peft_type") != "LORA" or content.get("bias", "none") != "none":
        raise UserError(f"{file}: only LoRA without biases is supported (peft_type LORA, bias none)")
    wrong = [key for key in CHANGING if content.get(key)]
    if str(content.get("init_lora_weights")).startswith(CHANGED_BASE):
        wrong.append("init_lora_weights")
    if wrong:
        raise UserError(
            f"{file}: {wrong[0]} is {content[wrong[0]]!r}, which is more than plain LoRA on its base's own weights; "
            "merge it with PEFT (merge_and_unload) and give the merged model"
        )


def _scaling(content: dict[str, Any], module: str | None) -> float:
    """alpha / rank of a module, by the patterns that PEFT matches with the end of its name."""

    def value(patterns: dict[str, Any] | None, default: Any) -> Any:
        try:
            found = [v for key, v in (patterns or {}).items() if module and re.fullmatch(rf"(.*\.)?({key})", module)]
        except re.error as error:
            raise UserError(f"{CONFIG}: a pattern of rank_pattern or alpha_pattern is no regular expression: {error}") from None
        return found[0] if found else default

    rank, alpha = (value(content.get(f"{of}_pattern"), content.get(key)) for of, key in (("rank", "r"), ("alpha", "lora_alpha")))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; must be a whole number above 0, and a number")
    return alpha / math.sqrt(rank) if content.get("use_rslora") else alpha / rank


def _leaf(tree: Any, path: tuple[str, ...]) -> Leaf:
    for name in path:
        tree = tree[name]
    return tree


def _node(tree: Params, path: tuple[str, ...]) -> Params:
    for name in path:
        tree = tree.setdefault(name, {})
    return tree
