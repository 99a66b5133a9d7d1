"""Hugging Face in and out: the functions that other rooms use, and a table of what can be loaded."""

import math
from typing import NamedTuple

import jax

from rlhf_jax.models.export_config import class_name
from rlhf_jax.models.families import FAMILIES, spec_of
from rlhf_jax.models.known import KNOWN
from rlhf_jax.models.load import Checkpoint, load_checkpoint, read_spec
from rlhf_jax.models.save import save_checkpoint
from rlhf_jax.models.spec import Leaf, Spec, leaves


class FamilyRow(NamedTuple):
    """One supported `model_type`."""

    model_type: str
    classes: tuple[str, ...]  # language model, reward model, critic
    loads: str


def families() -> list[FamilyRow]:
    """Every supported family with the classes it is exported as and the published models it covers."""
    return [
        FamilyRow(name, tuple(class_name(family, head) for head in ("lm", "score", "value")), family.loads)
        for name, family in FAMILIES.items()
    ]


def size(spec: Spec, head: str = "lm") -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves(spec, head), is_leaf=lambda x: isinstance(x, Leaf)))


def known_sizes() -> dict[str, int]:
    """Parameters of the public models whose shapes are known without a network."""
    return {name: size(spec_of(config)) for name, config in KNOWN.items()}


def describe_families() -> str:
    """The table of `rlhf-jax models`: families, what each loads, sizes."""
    width = max(map(len, FAMILIES))
    lines = [f"{row.model_type:{width}}  {row.loads}" for row in families()]
    lines += ["", "Known by name (shapes only, for rlhf-jax fit):"]
    lines += [f"  {name}  {number / 1e9:.2f}B parameters" for name, number in known_sizes().items()]
    lines += [
        "",
        "Every family is actor, critic, reward model and reference; files are safetensors in float32, bfloat16 or float16.",
    ]
    return "\n".join(lines)


__all__ = [
    "Checkpoint",
    "FamilyRow",
    "describe_families",
    "families",
    "known_sizes",
    "load_checkpoint",
    "read_spec",
    "save_checkpoint",
    "size",
]
