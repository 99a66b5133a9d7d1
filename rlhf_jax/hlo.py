"""Reading a compiled program: collectives, bytes and the compiler's own cycle estimates, loops counted as often as they run.

`Compiled.cost_analysis()` counts the body of every loop once, which for a scan over layers is wrong by the number of layers.
The text of the program names each loop's bound; this page multiplies by it. Pure functions of strings; imports no JAX.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BETWEEN_SLICES = " between slices"  # of a kind: over the data-center network
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\d*[a-z]*\d*\w*)\[([\d,]*)\]")
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "after-all", "iota"}


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


class Program(NamedTuple):
    computations: dict[str, list[Instruction]]
    times: dict[str, float]  # how often each computation runs (fused ones are counted with their caller)
    fused: dict[str, float]  # the same for computations reached through fusions
    unknown_loops: list[str]  # loops whose bound depends on data: counted `while_trips` times


class Traffic(NamedTuple):
    count: int
    bytes: float


class Report(NamedTuple):
    """What one execution of the program costs on one device."""

    collectives: dict[str, Traffic]  # kind -> how many, and bytes that they bring
    bytes: float  # read and written in HBM, fusions counted by their inputs and outputs
    cycles: float  # sum of the compiler's estimates (TPU only; excludes collectives and custom kernels), else 0
    kernels: int  # custom kernel calls


def shape_bytes(shape: str) -> float:
    """Bytes of an HLO shape such as `(f32[2,3]{1,0}, bf16[4])`; layouts are ignored."""
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(size) for size in sizes.split(",") if size) for dtype, sizes in _SHAPE.findall(shape)
    )


def parse(text: str, while_trips: float = 1) -> Program:
    """HLO text -> computations and how often each runs.

    Args:
      text: `Compiled.as_text()`.
      while_trips: runs of a loop whose bound is not a constant (a decode loop: its longest case).
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith((" ", "HloModule")):
            current = header.group(2)
            computations[current] = []
            entry = current if header.group(1) else entry
        elif current is not None:
            found = _LINE.match(line)
            if found:
                computations[current].append(Instruction(*found.groups()))
    calls: dict[str, list[tuple[str, float]]] = defaultdict(list)
    fusions: dict[str, list[str]] = defaultdict(list)
    unknown: list[str] = []
    for name, body in computations.items():
        for op in body:
            if op.opcode == "while":
                trips, known = _trip_count(op, computations, while_trips)
                if not known:
                    unknown.append(_attribute(op, "condition"))
                calls[name] += [(_attribute(op, "body"), trips), (_attribute(op, "condition"), trips)]
            elif op.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
                names = (
                    branches.group(1) if branches else " ".join(re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.rest))
                )
                calls[name] += [(branch, 1.0) for branch in re.findall(r"%?([\w.\-]+)", names)]
            elif op.opcode == "fusion":
                fusions[name].append(_attribute(op, "calls"))
            elif op.opcode in ("call", "async-start"):
                callee = _attribute(op, "to_apply") or _attribute(op, "calls") or _attribute(op, "called_computation")
                calls[name].append((callee, 1.0))
    times: dict[str, float] = defaultdict(float, {entry: 1.0})
    for name in _callers_first(entry, calls):
        for callee, count in calls[name]:
            times[callee] += times[name] * count
    fused: dict[str, float] = defaultdict(float)
    for name, count in list(times.items()):
        pending = list(fusions[name])
        while pending:
            callee = pending.pop()
            fused[callee] += count
            pending += fusions[callee]
    return Program(computations, dict(times), dict(fused), unknown)


def report(text: str, while_trips: float = 1, *, scope: str = "") -> Report:
    """Collectives, bytes, cycles and kernels of one execution on one device.

    Args:
      text, while_trips: as in `parse`. What one turn of a decode loop costs is the difference between two numbers of trips.
      scope: count only what was traced inside `jax.named_scope(scope)`, its gradient included.
    """
    program = parse(text, while_trips)
    places, started = _Places(program), _started(program)
    wanted = re.compile(rf"\b{re.escape(scope)}\b")
    traffic: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    moved, cycles, kernels = 0.0, 0.0, 0.0
    for name, body in program.computations.items():
        count, fused = program.times.get(name, 0.0), program.fused.get(name, 0.0)
        shapes = {op.name: op.shape for op in body}
        for op in body:
            kind = _collective(op)
            if kind and (count or fused):
                again = not count and _attribute(op, "channel_id") in started and name not in started.values()
                if not again and (not scope or wanted.search(places.of(name, op))):
                    traffic[kind][0] += count or fused
                    traffic[kind][1] += _brought(op) * (count or fused)
                continue
            if not count or (scope and not wanted.search(_op_name(op))):
                continue
            if op.opcode not in _FREE and not op.opcode.endswith("-done"):
                moved += count * _instruction_bytes(op, shapes, program)
            estimate = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
            if estimate:
                cycles += int(estimate.group(1)) * count
            kernels += count * (op.opcode == "custom-call" and "tpu_custom_call" in op.rest)
    return Report(
        collectives={kind: Traffic(int(n), size) for kind, (n, size) in sorted(traffic.items())},
        bytes=moved,
        cycles=cycles,
        kernels=int(kernels),
    )


def _attribute(op: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=\{{?%?([\w.\-]+)", op.rest)
    return found.group(1) if found else ""


def _op_name(op: Instruction) -> str:
    """Where it was traced, or "" where XLA has dropped that."""
    found = re.search(r'op_name="([^"]*)"', op.rest)
    return found.group(1) if found else ""


def _collective(op: Instruction) -> str:
    """Its kind, or ""."""
    kind = op.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        return kind
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest) if op.opcode == "recv" else None
    return transfer.group(1).lower().replace("_", "-") + BETWEEN_SLICES if transfer else ""


def _brought(op: Instruction) -> float:
    """Bytes that a collective brings to a device, its own part of the result included."""
    if op.opcode in ("all-gather-start", "collective-permute-start"):  # (operand, result, ...)
        parts = _SHAPE.findall(op.shape)
        return shape_bytes("{}[{}]".format(*parts[1])) if len(parts) > 1 else shape_bytes(op.shape)
    if op.opcode == "recv":  # (buffer, context, token)
        return shape_bytes("{}[{}]".format(*_SHAPE.findall(op.shape)[0]))
    return shape_bytes(op.shape)


def _started(program: Program) -> dict[str, str]:
    """Channel -> the computation that starts its collective.

    On TPU a collective that runs beside other work is written in every fusion that it overlaps: where it starts, in each that
    works meanwhile, and where it is done. It is one.
    """
    found = {}
    for name, body in program.computations.items():
        if any("AsyncCollectiveStart" in op.rest for op in body):
            found |= {_attribute(op, "channel_id"): name for op in body if _collective(op)}
    return found


class _Places:
    """Where collectives were traced.

    XLA drops that where there are several slices. Then it is where the nearest instruction was, among those that make what the
    collective takes or take what it makes, in its own computation or the one that calls it.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.callers = {
            callee: (name, op)
            for name, body in program.computations.items()
            for op in body
            if op.opcode in ("fusion", "while", "call", "async-start")
            for callee in re.findall(r"\b(?:calls|body|to_apply|called_computation)=%?([\w.\-]+)", op.rest)
        }
        self.graphs: dict[str, tuple[dict[str, Instruction], dict[str, list[str]]]] = {}

    def of(self, computation: str, op: Instruction) -> str:
        found = _op_name(op) or self._near(computation, op)
        while not found and computation in self.callers:
            computation, op = self.callers[computation]
            found = _op_name(op) or self._near(computation, op)
        return found

    def _near(self, computation: str, op: Instruction) -> str:
        """Breadth first; what an instruction takes before what takes it."""
        if computation not in self.graphs:
            body = {each.name: each for each in self.program.computations[computation]}
            links: dict[str, list[str]] = {name: [x for x in _operands(each) if x in body] for name, each in body.items()}
            for name, operands in [(name, list(each)) for name, each in links.items()]:
                for operand in operands:
                    links[operand].append(name)
            self.graphs[computation] = body, links
        body, links = self.graphs[computation]
        seen, pending = {op.name}, [op.name]
        for name in pending:
            if "/" in _op_name(body[name]):  # other names are XLA's own
                return _op_name(body[name])
            new = [each for each in dict.fromkeys(links[name]) if each not in seen]
            seen.update(new)
            pending += new
        return ""


def _operands(op: Instruction) -> list[str]:
    depth, end = 1, 0
    for end, char in enumerate(op.rest):  # noqa: B007 - the index is what we want
        depth += (char == "(") - (char == ")")
        if not depth:
            break
    return re.findall(r"%([\w.\-]+)", op.rest[:end])


def _trip_count(op: Instruction, computations: dict[str, list[Instruction]], while_trips: float) -> tuple[float, bool]:
    """The loop's bound: XLA's own note, or the one integer constant that the condition compares with."""
    noted = re.search(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)', op.rest)
    if noted:
        return float(noted.group(1)), True
    bounds, data_dependent = [], False
    for line in computations.get(_attribute(op, "condition"), []):
        if line.opcode == "constant" and re.match(r"[su]32\[\]", line.shape):
            bounds.append(int(re.match(r"(-?\d+)", line.rest).group(1)))  # type: ignore[union-attr]
        data_dependent |= line.opcode in ("and", "reduce") or (line.opcode == "fusion" and len(_operands(line)) > 2)
    if len(bounds) == 1 and not data_dependent:
        return float(bounds[0]), True
    return float(while_trips), False


def _instruction_bytes(op: Instruction, shapes: dict[str, str], program: Program) -> float:
    """Bytes read and written; an operand of which only a slice is used counts as that slice."""
    operands = _operands(op)
    if op.opcode == "dynamic-slice":
        return 2 * shape_bytes(op.shape)
    if op.opcode == "dynamic-update-slice":
        return 2 * shape_bytes(shapes.get(operands[1], "")) if len(operands) > 1 else 0.0
    if op.opcode != "fusion":
        return shape_bytes(op.shape) + sum(shape_bytes(shapes.get(name, "")) for name in operands)
    body = program.computations.get(_attribute(op, "calls"), [])
    inner = {line.name: line.shape for line in body}
    written = shape_bytes(op.shape)
    total = 0.0
    for line in body:
        if line.opcode != "parameter":
            continue
        uses = [other for other in body if line.name in _operands(other)]
        if uses and all(use.opcode == "dynamic-slice" for use in uses):
            total += sum(shape_bytes(use.shape) for use in uses)
        elif uses and all(use.opcode == "dynamic-update-slice" and _operands(use)[0] == line.name for use in uses):
            update = sum(shape_bytes(inner.get(_operands(use)[1], "")) for use in uses)
            written -= shape_bytes(line.shape) - update
            total += update
        else:
            total += shape_bytes(line.shape)
    return total + max(written, 0.0)


def _callers_first(entry: str, calls: dict[str, list[tuple[str, float]]]) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()
    stack: list[tuple[str, bool]] = [(entry, False)]
    while stack:
        name, finished = stack.pop()
        if finished:
            order.append(name)
        elif name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack += [(callee, False) for callee, _ in calls[name]]
    return order[::-1]
