"""Mesh, shardings and `compile_step`: the one place that calls `jax.jit`.

Parameters carry logical axis names; `RULES` says which mesh axis splits each. Mesh axes are Auto:
XLA's partitioner propagates, `constrain` pins what it would get wrong.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax import config
from rlhf_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
HOST = "pinned_host"  # memory of the machine that its accelerators can read
RULES: dict[str | None, Any] = {
    None: None,
    "layers": None,
    "batch": ("data", "fsdp"),
    "seq": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": None,
}
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    # Collective matmul splits each matrix product over fsdp into small permutes: slower by the compiler's estimate (docs/fit.md).
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    # LLVM's first level compiles a tenth faster and the programs are as fast: their products come from a library anyway.
    "cpu": {"xla_backend_optimization_level": 1},
}


def make_mesh(shape: config.Mesh, devices: list[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) over all devices; one axis may be -1, "what remains".

    Of several CPU devices: this process no longer reads compiled programs from disk (`compile_anew`).

    Raises:
      UserError: the product of the axes is not the number of devices, or the slices of a TPU do not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [shape.data, shape.fsdp, shape.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh: data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}: sizes are positive, and one at most is -1")
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if math.prod(sizes) != len(devices) or sizes[0] % slices:
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        there, rule, near = f"{len(devices)}", "", ""
        data = -(-abs(shape.data) // slices) * slices
        if slices > 1:
            there, rule, near = f"{there} in {slices} slices", f", data a multiple of {slices}", f"data={data}, "
        rest, left = divmod(len(devices), data * abs(shape.tensor))
        raise UserError(
            f"mesh: data={shape.data} x fsdp={shape.fsdp} x tensor={shape.tensor} asks for "
            f"{'a multiple of ' if -1 in (shape.data, shape.fsdp, shape.tensor) else ''}{fixed} devices, and there are {there}; "
            f"each size must be one of {divisors}{rule}, their product {len(devices)} (-1 takes what remains)"
            f"{'' if left else f'; nearest: {near}fsdp={rest}'}"
        )
    if len(devices) > 1 and devices[0].platform == "cpu":
        compile_anew()
    return Mesh(_lay_out(sizes, devices, slices), AXES, axis_types=(AxisType.Auto,) * 3)


def spread(width: int, devices: int) -> config.Mesh:
    """All devices: as many as divide a model's width split its weights and the batch, the others the batch alone."""
    return config.Mesh(data=devices // math.gcd(width, devices))


def compile_anew() -> None:
    """From now on this process neither reads nor writes compiled programs: with several CPU devices, one read back may hang.

    XLA runs what does not depend on one another side by side, and keeps collectives in one order on all devices. For a CPU, a
    program that was written and read back (JAX 0.10 and 0.12) has forgotten that order between a loop and what stands beside it.
    Every collective that waits holds a thread: with a thread a device, all soon wait for one another, and XLA aborts the process
    after 40 s. With `environment.THREADS` none of 1,752 updates did, but nothing bounds how many collectives wait at one time.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once and remembers


def _lay_out(sizes: list[int], devices: list[Any], slices: int) -> np.ndarray:
    """Devices in the order that puts mesh neighbours on neighbouring chips; slices of a TPU are split along `data`."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // slices, sizes[1], sizes[2]), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def axis_size(mesh: Mesh, logical: str | None) -> int:
    """In how many parts a logical axis is split."""
    rule = RULES[logical]
    names = (rule,) if isinstance(rule, str) else (rule or ())
    return math.prod(mesh.shape[name] for name in names)


def check_divides(mesh: Mesh, sizes: dict[str, tuple[str, int]]) -> None:
    """Refuse sizes that the mesh cannot split evenly.

    Args:
      sizes: what the user calls it -> (logical axis, size), for example {"batch_size": ("batch", 64)}.
    """
    wrong: list[str] = []
    axes: list[Any] = []
    for name, (logical, size) in sizes.items():
        parts = axis_size(mesh, logical)
        if size % parts:
            below, above = size // parts * parts, (size // parts + 1) * parts
            near = f"{below} or {above}" if below else str(above)
            wrong.append(f"{name}={size} is not a multiple of {parts} ({_arithmetic(mesh, logical)}); nearest: {near}")
            axes.append(RULES[logical])
    if wrong:
        remedies = []
        for axis in dict.fromkeys(axes):
            common = math.gcd(*(size for logical, size in sizes.values() if RULES[logical] == axis))
            remedies.append(f"mesh.{axis} may be {', '.join(str(n) for n in range(1, common + 1) if common % n == 0)}")
        remedy = "change the size, or the mesh" if RULES["batch"] in axes else "; ".join(remedies)
        raise UserError("mesh: " + "; ".join(wrong) + "; " + remedy)


def _arithmetic(mesh: Mesh, logical: str) -> str:
    rule = RULES[logical]
    names = (rule,) if isinstance(rule, str) else (rule or ())
    return " x ".join(f"{name}={mesh.shape[name]}" for name in names)


def partition(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], *, gather: tuple[str, ...] = ()) -> PartitionSpec:
    """Logical axes of one array -> its PartitionSpec. A dimension that its mesh axis does not divide is replicated.

    Args:
      gather: mesh axes that split nothing here (weights for decoding are whole on every fsdp shard).
    """
    parts: list[Any] = []
    for logical, size in zip(axes, shape, strict=True):
        rule = RULES[logical]
        taken = rule is None or rule in parts or rule in gather
        parts.append(None if taken or size % axis_size(mesh, logical) else rule)
    return PartitionSpec(*parts)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """First axis split over data and fsdp; whole on every device where `rows`, its size, is given and does not divide."""
    if rows is not None and rows % axis_size(mesh, "batch"):
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def param_shardings(mesh: Mesh, axes: Any, params: Any, *, gather: tuple[str, ...] = ()) -> Any:
    """Shardings of a parameter tree (arrays or abstract arrays) from its logical axes."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition(mesh, names, leaf.shape, gather=gather)),
        params,
        axes,
        is_leaf=lambda x: x is None,
    )


def optimizer_shardings(mesh: Mesh, tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Shardings of an optimiser state: its copies of the parameters lie as the parameters, the rest is replicated."""
    return optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def make_constrain(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """`constrain(x, logical axes)` for activations; the identity on one device."""
    if mesh.size == 1:
        return lambda x, axes: x

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        spec = partition(mesh, axes, x.shape)
        here = jax.sharding.get_abstract_mesh()
        if here.manual_axes:  # within `each_shard` the rows are this shard's own already
            spec = PartitionSpec(*(None if part in (RULES["batch"], *here.manual_axes) else part for part in spec))
            return jax.lax.with_sharding_constraint(x, NamedSharding(here, spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def make_constrain_rows(mesh: Mesh) -> Callable[[Any], Any]:
    """Pins a tree of arrays whose first axis is a (mini-)batch: shuffled rows go back to where rows belong."""
    if mesh.size == 1:
        return lambda tree: tree
    return lambda tree: jax.lax.with_sharding_constraint(tree, batch_sharding(mesh))


def make_constrain_whole(mesh: Mesh) -> Callable[[Any], Any]:
    """Pins a tree of small arrays to be whole on every device."""
    if mesh.size == 1:
        return lambda tree: tree
    return lambda tree: jax.lax.with_sharding_constraint(tree, replicated(mesh))


def make_by_rows(mesh: Mesh, wire_dtype: Any) -> Callable[..., Any]:
    """`by_rows(fn, weights, axes, *rows)` = fn(weights, *rows), every device with its own rows and whole matrices.

    The partitioner sums the gradient of a matrix that a loop uses over the devices at every turn of the loop. Here a matrix that
    is split over fsdp is gathered once before, in `wire_dtype`; its gradient stays on the device, is summed in the matrix's own
    dtype, and is reduced once after the loop. The tensor axis stays the partitioner's business.

    Args:
      weights: tree of parameters, axes: their logical axes; rows: trees of arrays (or None) whose first axis is the batch.
    """
    split = RULES["batch"]
    if mesh.devices.flat[0].platform == "cpu":  # XLA's CPU compiler aborts where it would widen the sum of such a gradient
        wire_dtype = np.float32

    def by_rows(fn: Callable[..., Any], weights: Any, axes: Any, *rows: Any) -> Any:
        parts = axis_size(mesh, "batch")
        if parts == 1 or any(leaf.shape[0] % parts for leaf in jax.tree.leaves(rows)):
            return fn(weights, *rows)
        whole = jax.tree.map(functools.partial(_gathered, mesh, wire_dtype), weights, axes)

        def own(whole: Any, *rows: Any) -> Any:
            varying = jax.tree.map(lambda x: jax.lax.pcast(x, split, to="varying"), whole)
            return fn(jax.tree.map(lambda x, like: x.astype(like.dtype), varying, weights), *rows)

        specs = (PartitionSpec(), *(PartitionSpec(split) for _ in rows))
        step = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(split), axis_names=set(split))
        return step(whole, *rows)

    return by_rows


def _gathered(mesh: Mesh, wire_dtype: Any, x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """A parameter, whole on every fsdp shard; `wire_dtype` is what travels."""
    spec, whole = (partition(mesh, names, x.shape, gather=gather) for gather in ((), ("fsdp",)))
    if spec != whole:  # pinned on both sides of the gather, or the partitioner gathers before it casts
        x = jax.lax.with_sharding_constraint(x.astype(wire_dtype), NamedSharding(mesh, spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, whole))


def each_shard(fn: Callable, mesh: Mesh) -> Callable:
    """`fn(params, rows, key) -> rows`, run by every shard of the batch on rows of its own and at its own pace.

    Within a shard the tensor axis is still the compiler's to split. Parameters and key are whole on every shard.
    """
    if axis_size(mesh, "batch") == 1:
        return fn
    whole, rows = PartitionSpec(), PartitionSpec(RULES["batch"])
    return jax.shard_map(
        fn, mesh=mesh, in_specs=(whole, rows, whole), out_specs=rows, axis_names=set(RULES["batch"]), check_vma=False
    )


def compile_step(fn: Callable, *, out: Any = None, donate: tuple[int, ...] = (), platform: str | None = None) -> Any:
    """Jit one step of a run with its shardings and donated arguments; None leaves a placement to the arguments.

    `platform` is the one it will be compiled for, by default that of this process's devices.
    """
    options: dict[str, Any] = {"donate_argnums": donate}
    if out is not None:
        options["out_shardings"] = out
    return jax.jit(fn, compiler_options=COMPILER_OPTIONS.get(platform or jax.default_backend()), **options)


def place(tree: Any, sharding: Any) -> Any:
    """Host arrays -> global arrays. Every process holds the whole batch and hands over its own shards."""

    def put(leaf: Any, where: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda leaf: put(leaf, sharding), tree)
    return jax.tree.map(put, tree, sharding)


def parked(tree: Any) -> Any:
    """Abstract arrays -> the same in the host's memory, split as before; scalars stay where they are."""

    def move(leaf: Any) -> Any:
        where = leaf.sharding.with_memory_kind(HOST) if leaf.ndim else leaf.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(move, tree)


def is_parked(leaf: Any) -> bool:
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None) == HOST


def can_park(mesh: Mesh) -> bool:
    """The devices can read the host's memory by themselves."""
    return any(memory.kind == HOST for memory in mesh.devices.flat[0].addressable_memories())


def on_device(fn: Callable, args: tuple[Any, ...]) -> Callable:
    """`fn` for arguments of which some are parked (`args`: the same as shapes): it begins by bringing those to the devices."""
    if not any(map(is_parked, jax.tree.leaves(args))):
        return fn

    def bring(leaf: Any, like: Any) -> Any:
        return jax.device_put(leaf, like.sharding.with_memory_kind("device")) if is_parked(like) else leaf

    def run(*given: Any) -> Any:
        pairs = zip(given, args, strict=True)
        return fn(*(jax.tree.map(bring, x, like) if any(map(is_parked, jax.tree.leaves(like))) else x for x, like in pairs))

    return run


def fetch(tree: Any) -> Any:
    """Global arrays -> NumPy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def get(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(get, tree)
