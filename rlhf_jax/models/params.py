"""Trees of parameters: drawn at random, described by logical axes, unstacked for decoding."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.spec import Leaf, Spec, groups, leaves
from rlhf_jax.types import Params


def init(spec: Spec, key: jax.Array, *, head: str = "lm", dtype: Any = jnp.float32) -> Params:
    """Draw the parameters: normal by fan-in, output matrices scaled by 1 / sqrt(2 layers), norms 1, biases 0.

    A leaf's key depends on its path alone, so neither sharding nor the other leaves change what is drawn.
    """

    def draw(path: tuple, leaf: Leaf) -> jax.Array:
        if leaf.std == 0:
            return jnp.full(leaf.shape, leaf.constant, dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return (leaf.std * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, leaves(spec, head), is_leaf=lambda x: isinstance(x, Leaf))


def axes(spec: Spec, params: Params, *, tensor: int = 1) -> Any:
    """Logical axis names of every leaf of `params`: whole models, heads, adapters, and layers unstacked for decoding.

    `tensor` is the number of parts that heads are split in. Where it does not divide those of keys and values, their matrices
    are whole: a part of a head is of no use to anybody.
    """
    table = leaves(spec, "lm") | {"score": leaves(spec, "value")["score"]}
    if spec.kv_heads % tensor:
        table = jax.tree.map(_whole_kv, table, is_leaf=lambda x: isinstance(x, Leaf))
    if not isinstance(params.get("layers"), list):
        return _axes_of(params, table)
    rest = {name: value for name, value in params.items() if name != "layers"}
    single = [_unstacked(table[name]) for name, members in groups(spec).items() for _ in members]
    return _axes_of(rest, table) | {"layers": [_axes_of(p, t) for p, t in zip(params["layers"], single, strict=True)]}


def _whole_kv(leaf: Leaf) -> Leaf:
    return leaf._replace(axes=tuple(None if name == "kv" else name for name in leaf.axes))


def _axes_of(tree: Any, table: Any) -> Any:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found[name] = _axes_of(value, table[name])
        elif name in ("lora_a", "lora_b"):
            *lead, inputs, outputs = table["kernel"].axes
            found[name] = (*lead, inputs, None) if name == "lora_a" else (*lead, None, outputs)
        else:
            found[name] = table[name].axes
    return found


def _unstacked(table: Any) -> Any:
    if isinstance(table, Leaf):
        return table._replace(shape=table.shape[1:], axes=table.axes[1:])
    return {name: _unstacked(value) for name, value in table.items()}


def unstack(spec: Spec, params: Params, compute_dtype: Any) -> Params:
    """What prefill and decode take: layers as a list, matrices in the compute dtype, as `hidden` casts them. Idempotent."""
    if isinstance(params.get("layers"), list):
        return params

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(compute_dtype) if path[-1].key in ("kernel", "embedding", "lora_a", "lora_b") else x

    params = jax.tree_util.tree_map_with_path(cast, params)
    names = groups(spec)
    layers = [jax.tree.map(lambda x, i=i: x[i], params[name]) for name, members in names.items() for i in range(len(members))]
    return {name: value for name, value in params.items() if name not in names} | {"layers": layers}
