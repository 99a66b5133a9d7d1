"""What the keys of a run file are: rows for the terminal, the page docs/configuration.md, and YAML of a whole configuration."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from rlhf_jax.config import STAGES, Run
from rlhf_jax.config_file import fields, group_of, type_words, without_none

_WORD = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)
_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


class Row(NamedTuple):
    """One key. `default` is as it is written in YAML, empty where the key is required."""

    name: str
    type: str
    unit: str
    default: str
    effect: str


def describe(cls: type, prefix: str = "") -> Iterator[Row]:
    """Every key of a configuration, the groups before their keys."""
    for field, kind in fields(cls):
        inner = group_of(kind)
        yield Row(prefix + field.name, type_words(kind), field.metadata.get("unit", ""), default_text(field), effect_of(field))
        if inner is not None:
            yield from describe(inner, f"{prefix}{field.name}{'' if without_none(kind) is inner else '[]'}.")


def line(row: Row) -> str:
    """A row for the terminal."""
    kind = ", ".join(part for part in (row.type, row.unit) if part)
    value = f" = {row.default}" if row.default else ""
    return f"{row.name}{value}  ({kind})\n    {row.effect}"


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default of a field as YAML; nothing for a group that has its own defaults, or for a required key."""
    if field.default is not dataclasses.MISSING:
        return flow(field.default)
    made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "" if made is None or dataclasses.is_dataclass(made) else flow(made)


def effect_of(field: dataclasses.Field[Any]) -> str:
    """The sentence beside a key; a key without one says so by its name."""
    return field.metadata.get("effect", field.name.replace("_", " "))


def flow(value: Any) -> str:
    """A value on one line of YAML, such that `config_file` reads the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        if _WORD.fullmatch(value) and value.lower() not in _NOT_TEXT:
            return value
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9).strip()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(str(key))}: {flow(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(flow(item) for item in value) + "]"


def dump(config: Any) -> str:
    """A whole configuration as YAML with comments; `config_file.load` makes an equal one of it."""
    return "\n".join(_block(config, "")) + "\n"


def _block(config: Any, indent: str) -> Iterator[str]:
    for field, _ in fields(type(config)):
        value = getattr(config, field.name)
        unit = field.metadata.get("unit", "")
        comment = f"  # {effect_of(field)}" + (f" [{unit}]" if unit else "")
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:{comment}"
            yield from _block(value, indent + "  ")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            yield f"{indent}{field.name}:{comment}"
            for item in value:
                first, *rest = _block(item, indent + "    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            yield f"{indent}{field.name}: {flow(value)}{comment}"


def markdown() -> str:
    """The page docs/configuration.md: every group once, with the stages that have it."""
    lines = [
        "# Configuration",
        "",
        "Written by `rlhf-jax config --markdown` from `rlhf_jax/config.py`; a test keeps it current.",
        "",
        "A run is one YAML file and, after it, `key=value` overrides: `rlhf-jax ppo configs/my.yaml ppo.kl_coef=0.1`.",
        "A group that is `null` by default is switched on by naming one of its keys: `ppo.adaptive_kl.target=6`.",
        "Unknown keys, equal keys, and values of the wrong type are refused with file and line before anything starts.",
        "",
    ]
    lines += ["## Every stage", "", *_table(Run, ())]
    for stage, cls in STAGES.items():
        lines += [f"## `rlhf-jax {stage}`, besides", "", *_table(cls, [field.name for field in dataclasses.fields(Run)])]
    places: dict[type, list[str]] = {}
    for cls in STAGES.values():
        for path, group in _groups(cls, ""):
            places.setdefault(group, []).append(f"`{path}`")
    for group, paths in places.items():
        lines += [f"## {' · '.join(dict.fromkeys(paths))}", "", *_table(group, ())]
    return "\n".join(lines)


def _table(cls: type, without: Collection[str]) -> Iterator[str]:
    yield "| key | type | unit | default | effect |"
    yield "|---|---|---|---|---|"
    for field, kind in fields(cls):
        if field.name not in without:
            default = default_text(field)
            cells = [f"`{field.name}`", type_words(kind), field.metadata.get("unit", ""), f"`{default}`" if default else ""]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in [*cells, effect_of(field)]) + " |"
    yield ""


def _groups(cls: type, prefix: str) -> Iterator[tuple[str, type]]:
    for field, kind in fields(cls):
        inner = group_of(kind)
        if inner is not None:
            path = f"{prefix}{field.name}{'' if without_none(kind) is inner else '[]'}"
            yield path, inner
            yield from _groups(inner, f"{path}.")
