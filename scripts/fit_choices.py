"""What the TPU compiler thinks of a choice: one program of a run file compiled with and without it, a table row each.

    python scripts/fit_choices.py CONFIG TOPOLOGY PROGRAM VARIANT ... [KEY=VALUE ...]

A VARIANT is `as it is`, `collective matmul`, `plain log-probabilities` (the partitioner's own split of the head's loop),
or `KEY=VALUE` of the run file; what follows a `--` holds for all. Memory alone is five times cheaper to ask for with
JAX_OPTIMIZATION_LEVEL=O1; the estimated seconds mean something at the default level only.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from rlhf_jax import config, config_file, topologies


@contextlib.contextmanager
def chosen(variant: str) -> Iterator[list[str]]:
    """The package with a choice made otherwise; gives the overrides of the run file."""
    from rlhf_jax import parallel

    if variant == "collective matmul":
        with mock.patch.object(parallel, "COMPILER_OPTIONS", {}):
            yield []
    elif variant == "plain log-probabilities":
        plain = lambda mesh, dtype: lambda fn, weights, axes, *rows: fn(weights, *rows)  # noqa: E731
        with mock.patch.object(parallel, "make_by_rows", plain):
            yield []
    elif variant == "as it is" or "=" in variant:
        yield [variant] if "=" in variant else []
    else:
        sys.exit(f"{variant!r} is no variant\n{__doc__}")


def main(path: str, topology: str, program: str, *rest: str) -> None:
    variants, common = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, ())
    machine = topologies.parse(topology)
    topologies.prepare_environment(machine)
    from rlhf_jax import fit

    stage = config_file.stage_of(Path(path))
    print("| variant | temporaries GiB | peak GiB | all-gather GiB | all-reduce GiB | est. s | of parts | TFLOP | compile s |")
    print("|" + "---|" * 9)
    for variant in variants:
        with chosen(variant) as overrides:
            run = config_file.load(Path(path), [*common, *overrides], config.STAGES[stage])
            (row,) = fit.fit(stage, run, machine, only=(program,)).rows
        moved = [row.cost.collectives.get(kind, (0, 0.0))[1] / fit.GIB for kind in ("all-gather", "all-reduce")]
        parts = ", ".join(f"{part.name} {part.seconds:.3g}" for part in row.parts)
        figures = [f"{x:.3g}" for x in (row.temporaries_gib, row.peak_gib, *moved, row.cost.seconds)]
        figures += [parts, f"{row.cost.flops / 1e12:.3g}", f"{row.compile_s:.0f}"]
        print(f"| {variant} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
