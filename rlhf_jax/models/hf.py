"""The table of `rlhf-jax models`: what can be loaded, and how large it is."""

import math

import jax

from rlhf_jax.models.families import FAMILIES, spec_of
from rlhf_jax.models.known import KNOWN
from rlhf_jax.models.spec import Leaf, Spec, leaves


def size(spec: Spec) -> int:
    """Number of parameters of a language model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves(spec, "lm"), is_leaf=lambda x: isinstance(x, Leaf)))


def known_sizes() -> dict[str, int]:
    """Parameters of the public models whose shapes are known without a network."""
    return {name: size(spec_of(config)) for name, config in KNOWN.items()}


def describe_families() -> str:
    """The table itself: families, what each loads, sizes."""
    width = max(map(len, FAMILIES))
    lines = [f"{name:{width}}  {family.loads}" for name, family in FAMILIES.items()]
    lines += ["", "Known by name (shapes only, for rlhf-jax fit):"]
    lines += [f"  {name}  {number / 1e9:.2f}B parameters" for name, number in known_sizes().items()]
    lines += [
        "",
        "Every family is actor, critic, reward model and reference; files are safetensors in float32, bfloat16 or float16.",
    ]
    return "\n".join(lines)
