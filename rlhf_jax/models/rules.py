"""A family as data, and the vocabulary in which its tensors are mapped to ours.

A rule says how one stored tensor is made of our leaves: each part is a *view* of the stored array, built from slicing,
reshaping and transposing alone. Loading reads the view, saving writes through it, so that the two cannot drift apart and a
round trip returns the bits.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.models.spec import Leaf, Spec, groups, leaves

View = Callable[[np.ndarray], np.ndarray]  # stored layout -> our layout, sharing memory


class Rule(NamedTuple):
    """One stored tensor, or one for each {layer} and {expert}."""

    theirs: str  # "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    parts: tuple[tuple[str, View], ...]  # ("layers/mlp/experts/up/kernel", view); absent leaves drop the rule
    shape: tuple[int, ...] | None = None  # as stored; None: the view is its own inverse, apply it to our shape
    inputs: int | None = None  # of a matrix: the stored axis that its inputs lie on


class Family(NamedTuple):
    """What `models` knows of a `model_type`."""

    spec: Callable[[dict[str, Any]], Spec]
    rules: Callable[[Spec], list[Rule]]
    name: str  # as transformers' classes begin
    lm: str | None = None  # class of the language model, where it is not {name}ForCausalLM
    score: str | None = None  # class of the reward model, where it is not {name}ForSequenceClassification
    value: str | None = ""  # class of the critic, where not {name}ForTokenClassification; None: transformers has none
    value_name: str = "score"  # tensor name of the critic's head
    prefix: str = "model."  # of the trunk's tensors; files saved from a bare trunk lack it
    renamed: tuple[tuple[str, str], ...] = ()  # prefixes that other files use, theirs -> as in the rules
    ignored: tuple[str, ...] = ()  # patterns of tensors that are no text weights (vision towers)
    old_config: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = (
        None  # (config, rope) -> keys of transformers 4
    )
    loads: str = ""  # published models, for `rlhf-jax models`


class Part(NamedTuple):
    """Where one of our leaves, or one slice of its leading axes, lies in a stored tensor."""

    leaf: tuple[str, ...]
    index: tuple[int, ...]  # layer within its group, and expert
    view: View


class Stored(NamedTuple):
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    inputs: int | None  # as in Rule


# -------------------------------------------------------------------------------------------------- writing rules


def same(x: np.ndarray) -> np.ndarray:
    return x


def transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def dense(theirs: str, ours: str, view: View = transposed) -> list[Rule]:
    """A linear layer, stored [out, in] by torch; `view=same` where it is stored [in, out] (Conv1D)."""
    weight = Rule(f"{theirs}.weight", ((f"{ours}/kernel", view),), inputs=int(view is transposed))
    return [weight, Rule(f"{theirs}.bias", ((f"{ours}/bias", same),))]


def norm(theirs: str, ours: str) -> list[Rule]:
    return [Rule(f"{theirs}.weight", ((f"{ours}/scale", same),)), Rule(f"{theirs}.bias", ((f"{ours}/bias", same),))]


def table(theirs: str, ours: str) -> list[Rule]:
    """An embedding."""
    return [Rule(f"{theirs}.weight", ((f"{ours}/embedding", same),))]


def fused(theirs: str, ours: Iterable[str], inputs: int, widths: Iterable[int], *, stored: View = transposed) -> list[Rule]:
    """Several linear layers, one after the other along the output axis."""
    ends = list(itertools.accumulate(widths))
    cuts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    weight = tuple((f"{name}/kernel", lambda w, c=c: stored(w)[:, c]) for name, c in zip(ours, cuts, strict=True))
    bias = tuple((f"{name}/bias", lambda b, c=c: b[c]) for name, c in zip(ours, cuts, strict=True))
    shape = (ends[-1], inputs) if stored is transposed else (inputs, ends[-1])
    return [Rule(f"{theirs}.weight", weight, shape, int(stored is transposed)), Rule(f"{theirs}.bias", bias, (ends[-1],))]


def prefixed(prefix: str, rules: Iterable[Rule]) -> list[Rule]:
    return [rule._replace(theirs=prefix + rule.theirs) for rule in rules]


def grouped_qkv(theirs: str, ours: str, spec: Spec) -> list[Rule]:
    """Queries of one key-value head, that head's key, its value, and so on: [kv_heads, queries + 2, head_dim, in].

    With as many key-value heads as heads this is q0 k0 v0 q1 k1 v1; with a single one it is all queries, k, v.
    """
    rows = spec.heads // spec.kv_heads
    split = (spec.kv_heads, rows + 2, spec.head_dim)
    picks = {"q": slice(0, rows), "k": slice(rows, rows + 1), "v": slice(rows + 1, rows + 2)}
    weight = tuple(
        (f"{ours}/{name}/kernel", lambda w, p=p: w.reshape(*split, -1)[:, p].transpose(3, 0, 1, 2)) for name, p in picks.items()
    )
    bias = tuple((f"{ours}/{name}/bias", lambda b, p=p: b.reshape(split)[:, p]) for name, p in picks.items())
    outputs = split[0] * split[1] * split[2]
    return [Rule(f"{theirs}.weight", weight, (outputs, spec.width), 1), Rule(f"{theirs}.bias", bias, (outputs,))]


# -------------------------------------------------------------------------------------------------- reading rules


def stored_tensors(spec: Spec, rules: Iterable[Rule], head: str) -> dict[str, Stored]:
    """Every tensor that a checkpoint of this spec holds, by name. Rules whose leaves the spec lacks fall away."""
    tree = leaves(spec, head)
    found: dict[str, Stored] = {}
    for rule in rules:
        if "{layer}" not in rule.theirs:
            _place(found, tree, rule, rule.theirs, None, ())
            continue
        for group, members in groups(spec).items():
            for row, layer in enumerate(members):
                experts = spec.layers[layer].experts
                if "{expert}" not in rule.theirs:
                    _place(found, tree, rule, rule.theirs.format(layer=layer), group, (row,))
                    continue
                for expert in range(experts.number if experts else 0):
                    _place(found, tree, rule, rule.theirs.format(layer=layer, expert=expert), group, (row, expert))
    return found


def _place(found: dict, tree: dict, rule: Rule, name: str, group: str | None, index: tuple[int, ...]) -> None:
    parts, shape = [], rule.shape
    for path, view in rule.parts:
        leaf_path = tuple(path.split("/"))
        if group is not None:
            leaf_path = (group, *leaf_path[1:])
        leaf = _find(tree, leaf_path)
        if leaf is None:
            return
        parts.append(Part(leaf_path, index, view))
        if shape is None:
            shape = view(np.empty(leaf.shape[len(index) :], np.bool_)).shape
    found[name] = Stored(tuple(shape or ()), tuple(parts), rule.inputs)


def _find(tree: Any, path: tuple[str, ...]) -> Leaf | None:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return tree
