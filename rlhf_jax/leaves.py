"""A pytree as {"actor/params/…": leaf} and back: the names that checkpoints, digests and dumps use.

Names depend on keys and fields only, never on the class of a container, so a checkpoint can be read without this package.
"""

from typing import Any

import jax
import numpy as np


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by slash-joined path, in tree order; numbers become arrays, None is no leaf. ValueError on a slash in a key."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [_part(entry) for entry in path] or ["state"]
        name = "/".join(parts)
        if any("/" in part or not part for part in parts) or name in named:
            raise ValueError(f"the state's key path {parts} cannot be a name: empty, with a slash, or there twice")
        named[name] = leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else np.asarray(leaf)
    return named


def leaf_specs(leaves: dict[str, Any]) -> dict[str, str]:
    """{name: "float32[4,8]"}."""
    return {name: f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]" for name, leaf in leaves.items()}


def parse_spec(spec: str) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape of "float32[4,8]"."""
    dtype, _, sizes = spec.rstrip("]").partition("[")
    return np.dtype(dtype), tuple(int(size) for size in sizes.split(",") if size)


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def unnest(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    named: dict[str, Any] = {}
    for key, value in tree.items():
        named |= unnest(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return named


def _part(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
