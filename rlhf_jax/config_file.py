"""A run file (YAML) and `key=value` overrides into the frozen dataclasses of `config`, strictly, before JAX is imported.

Every problem is collected and reported with its position, key, value, rule and, for an unknown key, the nearest known one.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf_jax import checks, strict_yaml
from rlhf_jax.config import STAGES
from rlhf_jax.errors import UserError
from rlhf_jax.strict_yaml import Node

T = TypeVar("T")
MAX_SHOWN = 10
_BAD: Any = object()  # stands for a value that has been reported
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NUMBER_LIKE = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)|0[xo][0-9a-fA-F]+", re.IGNORECASE)


def load(path: str | Path, overrides: Sequence[str], cls: type[T]) -> T:
    """The configuration `cls` of a run file, with overrides such as "ppo.kl_coef=0.1" applied in order.

    Raises UserError, with every problem found in one message.
    """
    return build(strict_yaml.read(path), overrides, cls)


def loads(text: str, overrides: Sequence[str], cls: type[T], *, name: str = "text") -> T:
    """As `load`, from a text; positions are `name`:line."""
    return build(strict_yaml.parse(text, lambda line: f"{name}:{line}"), overrides, cls)


def stages_of(path: str | Path) -> list[str]:
    """The stages that a run file may be for: those that know most of its top keys, in the order of `STAGES`."""
    root = strict_yaml.read(path)
    keys = root.value if isinstance(root.value, dict) else {}
    counts = {stage: sum(field.name in keys for field in dataclasses.fields(cls)) for stage, cls in STAGES.items()}
    return [stage for stage, count in counts.items() if count == max(counts.values())]


def stage_of(path: str | Path) -> str:
    """The stage that a run file is taken for where nobody says which: the first of `stages_of`."""
    return stages_of(path)[0]


def build(root: Node, overrides: Sequence[str], cls: type[T]) -> T:
    """The configuration `cls` of a tree that was already read."""
    if root.is_null:
        root = Node(value={}, where=root.where)
    for override in overrides:
        root = _override(root, override)
    reader = _Reader(cls)
    config = reader.read(cls, root, "")
    _raise(reader.problems)
    _raise([f"{_where(reader.positions, key)}: {text}" for key, text in checks.find_problems(config)])
    return config


def _raise(problems: Sequence[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise UserError("\n".join([*problems[:MAX_SHOWN], *more]))


def _where(positions: dict[str, str], name: str) -> str:
    """Where a key, or else the group that it would stand in, was written."""
    while name and name not in positions:
        name = name.rpartition(".")[0]
    return positions.get(name, "")


def _override(root: Node, override: str) -> Node:
    name, equals, text = override.partition("=")
    where = f"override {override!r}"
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
        raise UserError(f"{where}: write key=value, such as ppo.kl_coef=0.1")
    value = strict_yaml.parse(text, lambda line: where)
    if comment := strict_yaml.comment(text):
        raise UserError(f"{where}: {comment!r} would be a comment and be lost; quote the value, such as '{name}=\"a #b\"'")
    return _with(root, name.split("."), value, name)


def _with(node: Node, path: Sequence[str], value: Node, name: str) -> Node:
    """The tree with the value put at a path of keys; groups that are missing or null are made."""
    if not path:
        return value
    if not isinstance(node.value, dict) and not node.is_null:
        raise UserError(f"{value.where}: {name} lies inside {node.where}, which is no group of keys; override the whole of it")
    children = node.value if isinstance(node.value, dict) else {}
    child = children.get(path[0], Node(value="", where=value.where, plain=True))
    return Node(value=children | {path[0]: _with(child, path[1:], value, name)}, where=node.where)


def dotted_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, groups and what is in them, in the order of the source."""
    for field, kind in fields(cls):
        yield prefix + field.name
        inner = group_of(kind)
        if inner is not None:
            yield from dotted_names(inner, f"{prefix}{field.name}.")


def fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass with their types, resolved."""
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def without_none(kind: Any) -> Any:
    """X for `X | None`, else the type itself."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (inner,) = (arg for arg in typing.get_args(kind) if arg is not types.NoneType)
        return inner
    return kind


def group_of(kind: Any) -> type | None:
    """The dataclass of a group of keys (or of the items of a list of groups)."""
    inner = without_none(kind)
    if typing.get_origin(inner) is tuple:
        inner = typing.get_args(inner)[0]
    return inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None


class _Reader:
    """Turns nodes into typed values; keeps problems and the position of every key instead of stopping."""

    def __init__(self, cls: type):
        self.names = list(dotted_names(cls))
        self.problems: list[str] = []
        self.positions: dict[str, str] = {}

    def bad(self, node: Node, text: str) -> Any:
        self.problems.append(f"{node.where}: {text}")
        return _BAD

    def read(self, kind: Any, node: Node, name: str) -> Any:
        self.positions[name] = node.where
        inner = without_none(kind)
        if inner is not kind and node.is_null:
            return None
        origin, args = typing.get_origin(inner), typing.get_args(inner)
        if dataclasses.is_dataclass(inner):
            return self.read_group(typing.cast(type, inner), node, name)
        if origin is tuple:
            return self.read_list(args[0], node, name)
        if origin is dict:
            return self.read_mapping(args[1], node, name)
        if inner is Any:
            return self.read_any(node, name)
        if not isinstance(node.value, str):
            return self.bad(node, f"{name} is a {shape_word(node)}; it must be {type_words(kind)}")
        value = _scalar(inner, node)
        if value is not _BAD:
            return value
        shown = node.value if node.plain else f'"{node.value}"'
        if node.is_null:
            return self.bad(node, f"{name} has no value; it must be {type_words(kind)}")
        return self.bad(node, f"{name} is {_cut(shown)}; it must be {type_words(kind)}{_remedy(inner, node)}")

    def read_group(self, cls: type, node: Node, name: str) -> Any:
        if node.is_null:
            node = Node(value={}, where=node.where)
        if not isinstance(node.value, dict):
            keys = ", ".join(field.name for field in dataclasses.fields(cls)[:4])
            return self.bad(node, f"{name or 'the file'} is a {shape_word(node)}; it must be a group of keys ({keys}, ...)")
        values = {}
        prefix = f"{name}." if name else ""
        known = {field.name: (field, kind) for field, kind in fields(cls)}
        for key, child in node.value.items():
            if key not in known:
                self.bad(child, f"unknown key {_cut(prefix + key)!r}{self.suggestion(prefix, key, known)}")
                continue
            values[key] = self.read(known[key][1], child, prefix + key)
        for key, (field, _) in known.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and key not in node.value:
                values[key] = self.bad(node, f"{prefix}{key} is missing; it has no default")
        return _BAD if _BAD in values.values() else cls(**values)

    def read_list(self, kind: Any, node: Node, name: str) -> Any:
        if not isinstance(node.value, list):
            return self.bad(node, f"{name} is a {shape_word(node)}; it must be a list, such as [a, b]")
        values = tuple(self.read(kind, item, f"{name}.{i}") for i, item in enumerate(node.value))
        return _BAD if _BAD in values else values

    def read_mapping(self, kind: Any, node: Node, name: str) -> Any:
        if node.is_null:
            return {}
        if not isinstance(node.value, dict):
            return self.bad(node, f"{name} is a {shape_word(node)}; it must be a mapping, such as {{a: b}}")
        values = {key: self.read(kind, child, f"{name}.{key}") for key, child in node.value.items()}
        return _BAD if _BAD in values.values() else values

    def read_any(self, node: Node, name: str) -> Any:
        if isinstance(node.value, dict):
            return self.read_mapping(Any, node, name)
        if isinstance(node.value, list):
            return list(self.read_list(Any, node, name))
        if node.is_null:
            return None
        for kind in (bool, int, float):
            value = _scalar(kind, node)
            if value is not _BAD:
                return value
        return node.value

    def suggestion(self, prefix: str, key: str, known: dict[str, Any]) -> str:
        if key == "<<":
            return ": merge keys are not read; write the keys out, or use an alias for a whole group"
        same_place = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
        if same_place:
            return f"; did you mean {prefix + same_place[0]!r}?"
        elsewhere = [name for name in self.names if name.rpartition(".")[2] == key]
        elsewhere = elsewhere or difflib.get_close_matches(key, [n.rpartition(".")[2] for n in self.names], n=1, cutoff=0.8)
        full = [n for n in self.names if n in elsewhere or n.rpartition(".")[2] in elsewhere]
        if full:
            return f"; did you mean {' or '.join(repr(name) for name in full[:3])}?"
        owners = [
            stage for stage, cls in STAGES.items() if not prefix and key in {field.name for field in dataclasses.fields(cls)}
        ]
        if owners:
            return f": a key of {', '.join(owners)}; start the file with rlhf-jax {owners[0]}, or take the key out"
        group = prefix.rstrip(".") or "this file"
        return f"; {group} knows {_cut(', '.join(known), 200)}"


def _scalar(kind: Any, node: Node) -> Any:
    """The value of a scalar as a type, or _BAD. Only plain scalars can be numbers or booleans."""
    text = typing.cast(str, node.value)
    if typing.get_origin(kind) is Literal:
        return text if text in typing.get_args(kind) else _BAD
    if kind is str:
        odd = node.plain and (node.is_null or text in _BOOLS or _NUMBER_LIKE.fullmatch(text))
        return _BAD if odd else text
    if not node.plain:
        return _BAD
    if kind is bool:
        return _BOOLS.get(text, _BAD)
    if kind is int:
        return int(text) if _INT.fullmatch(text) else _BAD
    if kind is float and _FLOAT.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text):
        return float(text) if math.isfinite(float(text)) else _BAD
    return _BAD


def _remedy(kind: Any, node: Node) -> str:
    """What to write instead, where that can be told."""
    text = typing.cast(str, node.value)
    if typing.get_origin(kind) is Literal:
        near = difflib.get_close_matches(text, typing.get_args(kind), n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else ""
    if kind is str:
        return f'; write "{text}"'
    if kind is bool:
        meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}.get(text.lower())
        return f"; write {meant}" if meant else ""
    bare = text.replace("_", "").replace(",", "").strip()
    if kind is int and _FLOAT.fullmatch(bare) and math.isfinite(float(bare)):
        whole = str(round(float(bare)))
        return f"; write {whole}" if _INT.fullmatch(whole) else " of at most 18 digits"
    if kind is float and _FLOAT.fullmatch(bare) and math.isfinite(float(bare)):
        return f"; write {float(bare):g}"
    return ""


def shape_word(node: Node) -> str:
    """What a node is, in a word."""
    return "list" if isinstance(node.value, list) else "group of keys" if isinstance(node.value, dict) else "single value"


def type_words(kind: Any) -> str:
    """A type in words for people."""
    inner = without_none(kind)
    optional = " or null" if inner is not kind else ""
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "any value"}
    if origin is Literal:
        words = args[0] if len(args) == 1 else "one of " + ", ".join(args)
    elif origin is tuple:
        words = "a list, each " + ("a group of keys" if group_of(inner) else type_words(args[0]))
    elif origin is dict:
        words = "a mapping of names to " + type_words(args[1])
    elif group_of(inner):
        words = "a group of keys"
    else:
        words = simple[inner]
    return words + optional


def _cut(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
