"""Does a run fit a machine, and how fast can it be? Answered by compiling every program of the run for it, without having it.

XLA's real TPU compiler runs on a CPU machine. It is given the run's own programs (`programs.py`) with shapes instead of
weights, and says what each needs per device; the text of the compiled program gives collectives and cycle estimates.
"""

import dataclasses
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import config, hlo, parallel, programs, setups, topologies
from rlhf_jax.errors import UserError

GIB = 2**30


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
    flops: float  # per execution, per device
    bytes: float  # moved in HBM per execution, per device
    collectives: dict[str, tuple[int, float]]  # kind -> count, bytes per device
    seconds: float  # estimate: the slowest of compute, memory, links, and the compiler's own cycles where it states them
    bound: str
    compile_s: float
    error: str = ""


class Verdict(NamedTuple):
    topology: topologies.Topology
    mesh: dict[str, int]
    rows: list[Row]
    resident: dict[str, float]  # GiB per device of what stays in memory
    advice: list[str]

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
    steps, resident = setups.abstract_programs(stage, run, mesh)
    unknown = set(only) - set(steps)
    if unknown:
        raise UserError(f"--only {', '.join(sorted(unknown))}: this run has the programs {', '.join(steps)}")
    sizes = {name: tree_bytes(tree) / GIB for name, tree in resident.items()}
    rows = [
        measure(name, step, topology, sizes, resident, trips=run.sampling.max_new_tokens if name == "rollout" else 1)
        for name, step in steps.items()
        if not only or name in only
    ]
    return Verdict(topology, dict(mesh.shape), rows, sizes, advise(rows, run))


def measure(
    name: str,
    step: programs.Program,
    topology: topologies.Topology,
    sizes: dict[str, float],
    resident: dict[str, Any],
    *,
    trips: int,
) -> Row:
    """Compile one program and read off what it costs."""
    start = time.perf_counter()
    given = {id(leaf) for leaf in jax.tree.leaves(step.args)}
    others = sum(
        size
        for part, size in sizes.items()
        if not any(id(leaf) in given for leaf in jax.tree.leaves(resident[part])) and name not in _ABSENT.get(part, ())
    )
    traced = step.compile().trace(*step.args)
    flops = count_flops(traced.jaxpr, trips) / topology.devices
    blank = {"arguments_gib": tree_bytes(step.args) / GIB, "others_gib": others, "capacity_gib": topology.chip.hbm_gib}
    try:
        compiled = traced.lower().compile(compiler_options=_OPTIONS.get(topology.platform))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise
        needed = _needed_gib(message, topology.chip.hbm_gib)
        return Row(
            program=name, temporaries_gib=max(needed - blank["arguments_gib"], 0.0), peak_gib=needed + others, fits=False,
            flops=flops, bytes=0.0, collectives={}, seconds=float("nan"), bound="memory", error=message.splitlines()[0][:200],
            compile_s=time.perf_counter() - start, **blank,
        )  # fmt: skip
    memory, found = compiled.memory_analysis(), hlo.report(compiled.as_text(), trips)
    extra = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    blank["arguments_gib"] = memory.argument_size_in_bytes / GIB
    peak = (memory.argument_size_in_bytes + memory.temp_size_in_bytes + extra) / GIB + others
    chip = topology.chip
    bounds = {
        "compute": max(flops / chip.flops, found.cycles / chip.clock_hz),
        "memory": found.bytes / chip.hbm_bytes if not found.cycles else 0.0,
        "links": sum(each.bytes for each in found.collectives.values()) / chip.link_bytes,
    }
    if found.cycles and flops / chip.flops < 0.5 * bounds["compute"]:
        bounds["memory"] = bounds.pop("compute")
    bound = max(bounds, key=lambda each: bounds[each])
    return Row(
        program=name, temporaries_gib=memory.temp_size_in_bytes / GIB, peak_gib=peak, fits=peak <= chip.hbm_gib, flops=flops,
        bytes=found.bytes, collectives={kind: (each.count, each.bytes) for kind, each in found.collectives.items()},
        seconds=bounds[bound], bound=bound, compile_s=time.perf_counter() - start, **blank,
    )  # fmt: skip


# What is not in memory while a program runs: the decoding copy is dropped after the rollout.
_ABSENT = {"decoding copy": ("score", "reward", "learn", "sync")}
# Collective matmul splits each matrix product over fsdp into small permutes: 1.9x slower by the compiler's estimate.
_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


def tree_bytes(tree: Any) -> float:
    """Bytes per device of a tree of abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) is not None else leaf.shape
        size = 1
        for each in shape:
            size *= each
        total += size * (leaf.dtype.itemsize if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 8)
    return float(total)


def count_flops(jaxpr: Any, while_trips: int = 1) -> float:
    """Floating-point operations of the matrix products of a traced program, loops counted as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = 1
            for axis in contract:
                inner *= eqn.invars[0].aval.shape[axis]
            total += 2.0 * inner * eqn.outvars[0].aval.size
            continue
        times = {"scan": eqn.params.get("length", 1), "while": while_trips}.get(eqn.primitive.name, 1)
        inside = [count_flops(each, while_trips) for each in _inner_jaxprs(eqn)]
        if inside:
            total += times * (max(inside) if eqn.primitive.name == "cond" else sum(inside))
    return total


def _inner_jaxprs(eqn: Any) -> list[Any]:
    found = []
    for name, value in eqn.params.items():
        if name in ("bwd", "fwd_jaxpr_thunk", "jvp_jaxpr_fun", "jvp_jaxpr_thunk"):
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def _needed_gib(message: str, capacity: float) -> float:
    """What the compiler says it would need, from its out-of-memory message."""
    import re

    used = re.search(r"Used ([\d.]+)([GM])", message) or re.search(r"\(([\d.]+)([GM])\) exceeds", message)
    if not used:
        return 2 * capacity
    return float(used.group(1)) / (1 if used.group(2) == "G" else 1024)


_KNOBS = {
    "learn": ("{algorithm}.micro_batches", "model.remat", "batch_size"),
    "rollout": ("batch_size", "sampling.max_new_tokens", "mesh.tensor"),
    "score": ("score_parts", "model.logprob_chunk", "batch_size"),
    "reward": ("score_parts", "batch_size", "mesh.fsdp"),
    "update": ("micro_batches", "model.remat", "batch_size"),
    "sync": ("mesh.tensor", "model.compute_dtype", "mesh.fsdp"),
}


def advise(rows: list[Row], run: config.Run) -> list[str]:
    """The three keys that bring the worst program under the capacity, and by how much."""
    worst = max(rows, key=lambda row: row.peak_gib / row.capacity_gib, default=None)
    if worst is None or worst.fits:
        return []
    fixed = worst.arguments_gib + worst.others_gib
    room = worst.capacity_gib - fixed
    if room <= 0:
        factor = 1
        while fixed / factor > 0.8 * worst.capacity_gib:
            factor *= 2
        return [
            f"mesh.fsdp x {factor} (more devices): weights and optimisers alone need {fixed:.1f} of {worst.capacity_gib:.1f} GiB",
            "model.lora: train adapters; one frozen base instead of four models and two optimisers",
            "model.param_dtype: bfloat16 halves the weights",
        ]
    factor = 2
    while worst.temporaries_gib / factor > 0.9 * room:
        factor *= 2
    algorithm = next((name for name in ("ppo", "grpo", "rloo") if hasattr(run, name)), "ppo")
    texts = {
        "{algorithm}.micro_batches": f"{algorithm}.micro_batches: multiply by {factor}",
        "micro_batches": f"micro_batches: multiply by {factor}",
        "score_parts": f"score_parts: multiply by {factor}",
        "batch_size": f"batch_size: divide by {factor}",
        "sampling.max_new_tokens": f"sampling.max_new_tokens: divide by {factor}",
        "model.logprob_chunk": f"model.logprob_chunk: divide by {factor}",
        "model.remat": f"model.remat: full (now {run.model.remat})",
        "mesh.tensor": f"mesh.tensor: multiply by {min(factor, 4)}",
        "mesh.fsdp": f"mesh.fsdp: multiply by {factor}",
        "model.compute_dtype": "model.compute_dtype: bfloat16",
    }
    return [texts[key] for key in _KNOBS.get(worst.program, _KNOBS["learn"])]


def to_json(verdict: Verdict) -> str:
    """The table as JSON, numbers unrounded."""
    return json.dumps(
        {
            "topology": verdict.topology._asdict() | {"chip": verdict.topology.chip._asdict()},
            "mesh": verdict.mesh,
            "programs": [dataclasses.asdict(row) for row in verdict.rows],
            "resident_gib": verdict.resident,
            "fits": verdict.fits,
            "advice": verdict.advice,
        },
        indent=1,
    )


def to_text(verdict: Verdict) -> str:
    """The table for people, and for `docs/fit.md`."""
    chip, topology = verdict.topology.chip, verdict.topology
    lines = [
        f"{topology.name}: {topology.devices} devices ({topology.kind} {topology.shape}, {topology.slices} slice(s)), "
        f"{chip.hbm_gib:.2f} GiB each; mesh " + " x ".join(f"{name}={size}" for name, size in verdict.mesh.items()),
        "",
        "| program | arguments | temporaries | others | peak GiB | of capacity | TFLOP | GB moved "
        "| collectives (count, GiB) | est. s | bound | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in verdict.rows:
        share = f"{row.peak_gib / row.capacity_gib:.0%}" + ("" if row.fits else " DOES NOT FIT")
        gib = f"{row.arguments_gib:.2f} | {row.temporaries_gib:.2f} | {row.others_gib:.2f} | {row.peak_gib:.2f}"
        moves = ", ".join(f"{kind} {n} {size / GIB:.2f}" for kind, (n, size) in row.collectives.items()) or "none"
        lines.append(
            f"| {row.program} | {gib} | {share} | {row.flops / 1e12:.2f} | {row.bytes / 1e9:.1f} | {moves} "
            f"| {row.seconds:.3g} | {row.bound} | {row.compile_s:.0f} |"
        )
    lines += ["", "resident, GiB per device: " + ", ".join(f"{name} {size:.2f}" for name, size in verdict.resident.items())]
    worst = max(verdict.rows, key=lambda row: row.peak_gib / row.capacity_gib)
    lines.append(
        f"verdict: {'fits' if verdict.fits else 'DOES NOT FIT'}; the worst program is {worst.program} with "
        f"{worst.peak_gib:.2f} of {worst.capacity_gib:.2f} GiB ({worst.peak_gib / worst.capacity_gib:.0%})"
    )
    lines += [f"  change {text}" for text in verdict.advice]
    return "\n".join(lines)
