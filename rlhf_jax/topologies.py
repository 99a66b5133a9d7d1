"""Machines that a run may be compiled for without having one: names as they are rented, shapes, capacities.

Figures: HBM as the TPU compiler itself states it (usable GiB per device); peak rates, bandwidths from the vendor's data sheets;
clocks chosen so that the compiler's cycles at peak equal the data sheet's FLOP/s. Of v4's network no figure is stated: as v5p.
"""

import math
import os
import re
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """One kind of accelerator chip."""

    hbm_gib: float  # usable per device
    flops: float  # bf16 FLOP/s per device
    hbm_bytes: float  # bytes/s
    link_bytes: float  # bytes/s of all links of a device together
    clock_hz: float  # converts the compiler's cycles into seconds
    cores: int  # what the number in the rented name counts per chip: v4-8 is 4 chips
    shapes: tuple[str, ...]
    options: dict[str, Any] = {}  # noqa: RUF012 - read only
    network_bytes: float = 0.0  # bytes/s between slices, a device's share of the data-center network; 0: no slices


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
CHIPS = {
    "v4": Chip(30.75, 275e12, 1.228e12, 300e9, 1.05e9, 2, _CUBE, {"chip_config_name": "megacore"}, network_bytes=6.25e9),
    "v5e": Chip(15.75, 197e12, 0.819e12, 200e9, 1.5e9, 1, _FLAT, network_bytes=3.125e9),
    "v5p": Chip(95.73, 459e12, 2.765e12, 600e9, 1.75e9, 2, _CUBE, network_bytes=6.25e9),
    "v6e": Chip(31.24, 918e12, 1.64e12, 448e9, 1.75e9, 1, _FLAT, network_bytes=12.5e9),
}
GPUS = {
    "a100": Chip(79.0, 312e12, 2.04e12, 600e9, 1.41e9, 1, ()),
    "h100": Chip(79.0, 989e12, 3.35e12, 900e9, 1.83e9, 1, ()),
    "h200": Chip(139.0, 989e12, 4.8e12, 900e9, 1.83e9, 1, ()),
}


class Topology(NamedTuple):
    name: str
    platform: str  # tpu, cuda, cpu
    kind: str
    shape: str  # chips, "8x8"
    slices: int
    devices: int
    chip: Chip


def parse(name: str) -> Topology:
    """`v5e-64`, `v5p-128` (as rented: v4 and v5p count two cores a chip), `v5e:8x8`, `2xv5e-16` (slices), `h100-8`, `cpu-8`.

    Raises:
      UserError: no such machine; names the nearest ones.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*)(?:-(\d+)|:([\dx]+))", name)
    kinds = [*sorted(CHIPS | GPUS), "cpu"]
    if not found or found.group(2) not in kinds:
        raise UserError(
            f"--topology {name}: no such machine; use KIND-N, KIND:AxB or SLICESxKIND-N with KIND one of {', '.join(kinds)}"
        )
    slices, kind, number, shape = int(found.group(1) or 1), found.group(2), found.group(3), found.group(4)
    if kind == "cpu" or kind in GPUS:
        if shape or not int(number):
            raise UserError(f"--topology {name}: {kind} takes a number of devices, {kind}-8")
        devices = int(number) * slices
        chip = GPUS.get(kind) or Chip(_host_memory_gib() / devices, 1e11, 2e10, 1e10, 3e9, 1, ())
        return Topology(name, "cpu" if kind == "cpu" else "cuda", kind, number, slices, devices, chip)
    chip = CHIPS[kind]
    if shape is None:
        sizes = {_chips(each) * chip.cores: each for each in chip.shapes}
        if int(number) not in sizes:
            nearest = [f"{kind}-{n}" for n in sorted(sorted(sizes, key=lambda n: abs(n - int(number)))[:2])]
            raise UserError(
                f"--topology {name}: {kind} is rented in sizes {', '.join(map(str, sorted(sizes)))}"
                f"{' (two cores a chip)' if chip.cores == 2 else ''}; nearest: {' or '.join(nearest)}"
            )
        shape = sizes[int(number)]
    elif shape not in chip.shapes:
        raise UserError(f"--topology {name}: {kind} comes in shapes {', '.join(chip.shapes)}")
    return Topology(name, "tpu", kind, shape, slices, _chips(shape) * slices, chip)


def prepare_environment(topology: Topology) -> None:
    """Set what the compilers want to find before JAX is imported, and keep the TPU library quiet."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.platform == "cpu":
        flag = f"--xla_force_host_platform_device_count={topology.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    quiet = {
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what was compiled for another machine cannot be read back
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)


def devices(topology: Topology) -> list[Any]:
    """Devices of the topology, in an order that a mesh can be laid over; there is nothing behind them.

    Raises:
      UserError: the compiler for the platform is not installed.
    """
    import jax
    from jax.experimental import topologies

    if topology.platform == "cpu":
        return list(jax.devices("cpu"))[: topology.devices]
    options = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.kind}:{topology.shape}" if topology.platform == "tpu" else topology.kind
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform=topology.platform, **options).devices)
    except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
        extra = "tpu" if topology.platform == "tpu" else "cuda"
        raise UserError(
            f"--topology {topology.name}: no compiler for {topology.platform} here ({str(error).splitlines()[0][:120]}); "
            f"pip install 'rlhf-jax[{extra}]'"
        ) from error


def _chips(shape: str) -> int:
    return math.prod(int(size) for size in shape.split("x"))


def _host_memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
