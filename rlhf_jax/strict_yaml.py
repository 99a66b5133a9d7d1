"""YAML as a tree that remembers where everything stands, and without the traps of YAML 1.1.

PyYAML keeps the last of two equal keys, reads `1e-5` as text, `no` as False, `010` as 8 and `12:30` as 750. Here equal keys are
refused, and a scalar stays text until `config_file` knows which type its key has. Tags are refused, so nothing but text,
lists and mappings can come out; size, depth and number of nodes are bounded, so aliases cannot blow up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from rlhf_jax.errors import UserError

Where = Callable[[int], str]
MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 20_000


@dataclass(frozen=True, kw_only=True)
class Node:
    """A scalar (text), list or mapping, and where it was written."""

    value: "str | list[Node] | dict[str, Node]"
    where: str
    plain: bool = False  # a scalar without quotes, whose type depends on the key

    @property
    def is_null(self) -> bool:
        return self.plain and self.value in ("", "~", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):
    """Composes nodes only; never constructs a Python object."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise ComposerError(None, None, f"the tag {event.tag} is not allowed", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read(path: str | Path) -> Node:
    """The tree of a file. UserError if it is missing, too large, not UTF-8 or not YAML."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: a run file has at most {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    return parse(text, lambda line: f"{path}:{line}")


def parse(text: str, where: Where) -> Node:
    """The tree of a text; `where` makes a position from a line number that starts at 1."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(_syntax_message(error, text, where, mark.line if mark else 0)) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{where(line)}: the character {chr(error.character)!r} is not allowed in YAML") from None
    finally:
        if loader is not None:
            loader.dispose()
    if root is None:
        return Node(value="", where=where(1), plain=True)
    return _convert(root, where, [0], 0)


def comment(text: str) -> str:
    """The first comment in a text that `parse` takes: what stands between its tokens; "" where there is none."""
    end = 0
    for token in yaml.scan(text):
        between = text[end : token.start_mark.index]
        if "#" in between:
            return between[between.index("#") :].splitlines()[0]
        end = token.end_mark.index
    return ""


def _syntax_message(error: yaml.MarkedYAMLError, text: str, where: Where, line: int) -> str:
    lines = text.splitlines()
    problem = error.problem or "not valid YAML"
    for near in (line, line - 1):  # an indentation error is noticed one line late
        if 0 <= near < len(lines) and "\t" in lines[near][: len(lines[near]) - len(lines[near].lstrip())]:
            return f"{where(near + 1)}: a tab; YAML is indented with spaces"
    if "could not find expected ':'" in problem:
        problem = "a line without 'key: value'"
    return f"{where(line + 1)}: {problem}"


def _convert(node: yaml.Node, where: Where, count: list[int], depth: int) -> Node:
    line = node.start_mark.line + 1
    count[0] += 1
    if count[0] > MAX_NODES or depth > MAX_DEPTH:
        raise UserError(f"{where(line)}: too large once aliases are followed; write the values out")
    if isinstance(node, yaml.ScalarNode):
        return Node(value=node.value, where=where(line), plain=node.style is None)
    if isinstance(node, yaml.SequenceNode):
        return Node(value=[_convert(item, where, count, depth + 1) for item in node.value], where=where(line))
    mapping: dict[str, Node] = {}
    for key, value in node.value:
        at = where(key.start_mark.line + 1)
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{at}: a key is a word, not a list or a mapping")
        if key.value in mapping:
            raise UserError(f"{at}: the key {key.value!r} stands here a second time (first: {mapping[key.value].where})")
        converted = _convert(value, where, count, depth + 1)
        mapping[key.value] = Node(value=converted.value, where=at, plain=converted.plain)
    return Node(value=mapping, where=where(line))
