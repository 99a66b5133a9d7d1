"""Floating-point operations of a traced program, loops counted as often as they run (XLA's own count takes each body once)."""

import math
import re
from typing import Any

_GENERATORS = ("bwd", "fwd_jaxpr_thunk", "jvp_jaxpr_fun", "jvp_jaxpr_thunk")  # rules that are not part of the program


def count_flops(jaxpr: Any, while_trips: float = 1, *, scope: str = "") -> float:
    """Those of the matrix products, over all devices.

    Args:
      jaxpr: of `jitted.trace(...)`; while_trips: runs of a loop whose bound depends on data.
      scope: count only what was traced inside `jax.named_scope(scope)`, its gradient included.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        within = not scope or re.search(rf"\b{re.escape(scope)}\b", str(eqn.source_info.name_stack)) is not None
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += within * 2.0 * math.prod(eqn.invars[0].aval.shape[axis] for axis in contract) * eqn.outvars[0].aval.size
            continue
        inside = [count_flops(each, while_trips, scope="" if within else scope) for each in _inner(eqn)]
        if inside:
            total += _times(eqn, while_trips) * (max(inside) if eqn.primitive.name == "cond" else sum(inside))
    return total


def _times(eqn: Any, while_trips: float) -> float:
    """How often what stands inside runs."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "while":
            return while_trips
        case "shard_map":  # written for one shard
            names = eqn.params.get("newly_manual_axes", eqn.params.get("manual_axes", ()))  # its name until jax 0.10, and since
            return math.prod(eqn.params["mesh"].shape[name] for name in names)
        case "pallas_call":  # written for one block; skipped blocks are counted too
            return math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _inner(eqn: Any) -> list[Any]:
    found = []
    for name, value in eqn.params.items():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns") and name not in _GENERATORS:
                found.append(inner)
    return found
