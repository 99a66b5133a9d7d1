"""Does a run fit a machine, and how fast can it be? Answered by compiling every program of the run for it, without having it.

XLA's real TPU compiler runs on a CPU machine. It is given the run's own programs (`programs.py`) with shapes instead of
weights, and says what each needs per device; the text of the compiled program gives collectives and cycle estimates.

The parts of a program (prefill and decode step of a rollout, actor and critic of an update) are read off the same text: what
one turn of the decode loop costs is the difference between two numbers of turns, the rest are named scopes.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import continuous, fit_advice, hlo, parallel, programs, setups_abstract, topologies
from rlhf_jax.errors import UserError
from rlhf_jax.fit_advice import Advice
from rlhf_jax.fit_flops import count_flops
from rlhf_jax.types import OfflineState, TrainState

GIB = 2**30
SCOPES = {"score": ("actor", "reference", "critic"), "learn": ("actor", "critic")}  # jax.named_scope in scoring and update


class Cost(NamedTuple):
    """What executing a program, or a part of it, takes on one device."""

    name: str
    flops: float
    bytes: float  # moved in HBM
    collectives: dict[str, tuple[int, float]]  # kind -> count, bytes
    seconds: float  # estimate: the slowest of compute, memory, links, network, and the compiler's own cycles where it states them
    bound: str  # which of them: compute, memory, links or network (between slices)
    kernels: int  # calls of custom kernels (flash attention)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One program on one device of the machine."""

    program: str
    arguments_gib: float
    temporaries_gib: float
    others_gib: float  # what else is resident meanwhile: models and optimisers that the program does not take
    peak_gib: float  # arguments + temporaries + results that are not donated + others
    capacity_gib: float
    fits: bool
    cost: Cost
    parts: tuple[Cost, ...] = ()
    compile_s: float
    error: str = ""


class Verdict(NamedTuple):
    topology: topologies.Topology
    mesh: dict[str, int]
    rows: list[Row]
    resident: dict[str, float]  # GiB per device of what stays in memory
    advice: list[Advice]

    @property
    def fits(self) -> bool:
        return all(row.fits for row in self.rows)


def fit(stage: str, run: Any, topology: topologies.Topology, *, only: tuple[str, ...] = ()) -> Verdict:
    """Compile the programs of a run for a topology.

    Args:
      stage: "sft", "reward", "ppo" or another online algorithm: what the run file describes.
      run: the run's configuration; weights and data are not read, shapes come from config.json or model.scratch.
      topology: `topologies.parse(name)`; call `topologies.prepare_environment` before JAX is imported.
      only: names of programs; empty: all.
    Raises:
      UserError: the mesh does not fit the topology or the model, or there is no compiler for it.
    """
    mesh = parallel.make_mesh(run.mesh, topologies.devices(topology))
    steps, resident = setups_abstract.abstract_programs(stage, run, mesh)
    unknown = set(only) - set(steps)
    if unknown:
        raise UserError(f"--only {', '.join(sorted(unknown))}: this run has the programs {', '.join(steps)}")
    turns = turns_of(stage, run, parallel.axis_size(mesh, "batch"))
    rows = [measure(name, step, topology, resident, turns) for name, step in steps.items() if not only or name in only]
    sizes = {name: tree_bytes(tree) / GIB for name, tree in resident.items()}
    advice = []
    if not all(row.fits for row in rows):
        needs = [_need(row, resident) for row in rows]
        advice = fit_advice.advise(needs, stage, run, dict(mesh.shape), _shape(run, mesh))
    return Verdict(topology, dict(mesh.shape), rows, sizes, advice)


def _need(row: Row, resident: dict[str, Any]) -> fit_advice.Need:
    """The parts of a program's peak."""
    there = {name: tree for name, tree in resident.items() if name not in _ABSENT.get(row.program, ())}
    states = [tree.trained if isinstance(tree, OfflineState) else tree for tree in there.values()]
    states = [state for state in states if isinstance(state, TrainState)]
    parts = {name: tree_bytes(there.get(name)) / GIB for name in ("reference", "reward", "base")}
    parts["copy"] = tree_bytes(resident.get("decoding copy") if row.program == "sync" else there.get("decoding copy")) / GIB
    parts["moments"] = sum(tree_bytes(state.opt_state) for state in states) / GIB
    trained = [there.get(name) for name in ("actor", "critic", "ema", "model")]
    parts["trained"] = tree_bytes(trained) / GIB - parts["moments"]
    rest = max(row.peak_gib - row.temporaries_gib - sum(parts.values()), 0.0)
    gradients = [jax.tree.map(lambda x: programs.abstract(x.shape, jnp.float32, x.sharding), state.params) for state in states]
    gradient = max(map(tree_bytes, gradients), default=0.0) / GIB
    temporary = row.peak_gib - rest - sum(parts.values())
    return fit_advice.Need(row.program, row.capacity_gib, temporary, rest=rest, gradient=gradient, **parts)


def _shape(run: Any, mesh: Mesh) -> fit_advice.Shape:
    spec = setups_abstract.abstract_spec(run, run.model.path)
    cache = 0
    if hasattr(run, "sampling"):
        rows = (run.sampling.rows or run.batch_size) / parallel.axis_size(mesh, "batch")
        slots = run.data.max_prompt_tokens + run.sampling.max_new_tokens
        split = mesh.shape["tensor"] if spec.kv_heads % mesh.shape["tensor"] == 0 else 1
        size = jnp.dtype(run.model.compute_dtype).itemsize
        cache = 2 * len(spec.layers) * rows * slots * spec.kv_heads // split * spec.head_dim * size
    return fit_advice.Shape(spec.vocab_size, spec.width, math.gcd(spec.heads, spec.mlp_width, spec.vocab_size), cache / GIB)


SAMPLERS = ("rollout", "answer", "greedy")


class Turns(NamedTuple):
    """How often loops run, when every answer is as long as it may be."""

    loops: Mapping[str, float] = MappingProxyType({})  # by program, those that data end: steps of a rollout, packed parts
    prefills: Mapping[str, int] = MappingProxyType({})  # by program: after each of them the loop of a rollout runs
    updates: int = 1  # optimiser steps of an update


def turns_of(stage: str, run: Any, ways: int) -> Turns:
    """Of a run whose batches are split over `ways` devices."""
    if not hasattr(run, "sampling"):
        return Turns()
    settings, length = getattr(run, stage), run.data.max_prompt_tokens + run.sampling.max_new_tokens
    group = getattr(settings, "group_size", 1)
    decoding = {name: _decoding(run, ways, 1 if name == "answer" else group) for name in SAMPLERS}
    loops: dict[str, float] = {name: steps for name, (_, steps) in decoding.items()}
    if run.data.packing:
        rows, width = programs.packed_shape(stage, run, length, ways)
        for name, batch in (
            ("score", run.batch_size),
            ("reward", run.batch_size),
            ("learn", run.batch_size // settings.minibatches),
        ):
            loops[name] = -(-batch // (width // length * rows))
    return Turns(loops, {name: prefills for name, (prefills, _) in decoding.items()}, settings.epochs * settings.minibatches)


def _decoding(run: Any, ways: int, samples: int) -> tuple[int, float]:
    """Prefills of a rollout, and decoding steps after each."""
    steps = max(run.sampling.max_new_tokens - 1, 1)
    if run.sampling.rows is None:
        return 1, steps
    rows = run.sampling.rows // ways
    prefills, waves = continuous.longest_case(run.batch_size // ways, rows, continuous.usual_refill(rows, samples))
    return prefills, waves * steps / prefills


def measure(name: str, step: programs.Program, topology: topologies.Topology, resident: dict[str, Any], turns: Turns) -> Row:
    """Compile one program and read off what it costs."""
    start, chip = time.perf_counter(), topology.chip
    given = {id(leaf) for leaf in jax.tree.leaves(step.args)}
    absent = _ABSENT.get(name, ())
    rest = [leaf for part, tree in resident.items() if part not in absent for leaf in jax.tree.leaves(tree)]
    others = tree_bytes([leaf for leaf in rest if id(leaf) not in given]) / GIB
    arguments = tree_bytes(step.args) / GIB
    traced = step.compile(topology.platform).trace(*step.args)

    def row(temporaries: float, peak: float, cost: Cost, parts: tuple[Cost, ...] = (), error: str = "") -> Row:
        return Row(
            program=name, arguments_gib=arguments, temporaries_gib=temporaries, others_gib=others, peak_gib=peak,
            capacity_gib=chip.hbm_gib, fits=peak <= chip.hbm_gib and not error, cost=cost, parts=parts,
            compile_s=time.perf_counter() - start, error=error,
        )  # fmt: skip

    try:
        compiled = traced.lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise
        needed = _needed_gib(message, chip.hbm_gib)
        cost = Cost("", count_flops(traced.jaxpr, turns.loops.get(name, 1)) / topology.devices, 0.0, {}, math.nan, "memory", 0)
        return row(max(needed - arguments, 0.0), needed + others, cost, error=message.splitlines()[0][:200])
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    # An array that is handed over twice (a base under two adapters) lies in memory once: arguments are ours, not the compiler's.
    peak = arguments + (memory.temp_size_in_bytes + made) / GIB + others
    cost, parts = _costs(name, traced.jaxpr, compiled.as_text(), topology, turns)
    return row(memory.temp_size_in_bytes / GIB, peak, cost, parts)


# What is no longer in memory when a program starts. The last copy of the weights for decoding is dropped before the next one is
# made, and an update is not handed over before the rollout that read the copy is finished (`online.train`); scoring is, and
# finds the copy there.
_ABSENT = {"sync": ("decoding copy",), "learn": ("decoding copy", "ema to evaluate")}


def _costs(name: str, jaxpr: Any, text: str, topology: topologies.Topology, turns: Turns) -> tuple[Cost, tuple[Cost, ...]]:
    """Of the program, and of its parts."""

    def cost(label: str, trips: float, scope: str = "", less: float | None = None, times: int = 1) -> Cost:
        def both(trips: float) -> tuple[float, hlo.Report]:
            return count_flops(jaxpr, trips, scope=scope), hlo.report(text, trips, scope=scope)

        flops, found = both(trips)
        before, base = (0.0, None) if less is None else both(less)
        return estimate(label, (flops - before) / topology.devices / times, _scaled(found, base, times), topology.chip)

    trips = turns.loops.get(name, 1)
    whole = cost("", trips)
    if name in SAMPLERS:
        return whole, (cost("prefill", 0), cost("decode step", 1, less=0, times=turns.prefills[name]))
    times = turns.updates if name == "learn" else 1
    label = "{}, one step" if name == "learn" else "{}"
    parts = (cost(label.format(scope), trips, scope, times=times) for scope in SCOPES.get(name, ()))
    return whole, tuple(part for part in parts if part.flops)


def _scaled(found: hlo.Report, base: hlo.Report | None, times: int) -> hlo.Report:
    """(found - base) / times."""
    none = hlo.Traffic(0, 0.0)

    def less(kind: str, traffic: hlo.Traffic) -> hlo.Traffic:
        other = none if base is None else base.collectives.get(kind, none)
        return hlo.Traffic((traffic.count - other.count) // times, (traffic.bytes - other.bytes) / times)

    collectives = {kind: less(kind, traffic) for kind, traffic in found.collectives.items()}
    return found._replace(
        collectives={kind: traffic for kind, traffic in collectives.items() if traffic.count},
        bytes=(found.bytes - (base.bytes if base else 0.0)) / times,
        cycles=(found.cycles - (base.cycles if base else 0.0)) / times,
        kernels=(found.kernels - (base.kernels if base else 0)) // times,
    )


def estimate(name: str, flops: float, found: hlo.Report, chip: topologies.Chip) -> Cost:
    """Seconds and what bounds them. A lower bound: the compiler's cycles leave collectives and custom kernels out."""
    across = sum(each.bytes for kind, each in found.collectives.items() if kind.endswith(hlo.BETWEEN_SLICES))
    bounds = {
        "compute": max(flops / chip.flops, found.cycles / chip.clock_hz),
        "memory": found.bytes / chip.hbm_bytes if not found.cycles else 0.0,
        "links": (sum(each.bytes for each in found.collectives.values()) - across) / chip.link_bytes,
        "network": across / chip.network_bytes if across else 0.0,
    }
    if found.cycles and flops / chip.flops < 0.5 * bounds["compute"]:
        bounds["memory"] = bounds.pop("compute")
    bound = max(bounds, key=lambda each: bounds[each])
    collectives = {kind: (each.count, each.bytes) for kind, each in found.collectives.items()}
    return Cost(name, flops, found.bytes, collectives, bounds[bound], bound, found.kernels)


def tree_bytes(tree: Any) -> float:
    """Bytes per device of a tree of abstract arrays with shardings; a leaf that occurs twice counts once, a parked one not."""
    total = 0
    for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree) if not _elsewhere(leaf)}.values():
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) is not None else leaf.shape
        size = leaf.dtype.itemsize if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 8
        total += math.prod(shape) * size
    return float(total)


def _elsewhere(leaf: Any) -> bool:
    """Parked in memory that is not the devices' own, as a CPU's is."""
    return parallel.is_parked(leaf) and next(iter(leaf.sharding.device_set)).platform != "cpu"


def _needed_gib(message: str, capacity: float) -> float:
    """What the compiler says it would need, from its out-of-memory message."""
    used = re.search(r"Used ([\d.]+)([GM])", message) or re.search(r"\(([\d.]+)([GM])\) exceeds", message)
    if not used:
        return 2 * capacity
    return float(used.group(1)) / (1 if used.group(2) == "G" else 1024)
