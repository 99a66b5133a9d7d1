"""The verdict of `fit` as JSON and as a table."""

import dataclasses
import json
import math

from rlhf_jax.fit import GIB, Cost, Row, Verdict

HEADER = (
    "| program | arguments | temporaries | others | peak GiB | of capacity | TFLOP | GB moved | collectives (count, GiB) "
    "| est. s | bound | compile s |"
)


def to_json(verdict: Verdict) -> str:
    """The table as JSON, numbers unrounded."""
    content = {
        "topology": verdict.topology._asdict() | {"chip": verdict.topology.chip._asdict()},
        "mesh": verdict.mesh,
        "programs": [_row(row) for row in verdict.rows],
        "resident_gib": verdict.resident,
        "fits": verdict.fits,
        "advice": [each._asdict() for each in verdict.advice],
    }
    return json.dumps(content, indent=1, allow_nan=False)


def _row(row: Row) -> dict:
    found = dataclasses.asdict(row)
    cost = row.cost._asdict()
    del found["cost"], cost["name"]
    if not math.isfinite(row.cost.seconds):  # the compiler refused the program
        cost |= dict.fromkeys(("seconds", "bytes", "collectives", "kernels"))
    return found | cost | {"parts": {part.name: part._replace(name="")._asdict() for part in row.parts}}


def to_text(verdict: Verdict) -> str:
    """The table for people, and for `docs/fit.md`."""
    chip, topology = verdict.topology.chip, verdict.topology
    lines = [
        f"{topology.name}: {topology.devices} devices ({topology.kind} {topology.shape}, {topology.slices} slice(s)), "
        f"{chip.hbm_gib:.2f} GiB each; mesh " + " x ".join(f"{name}={size}" for name, size in verdict.mesh.items()),
        "",
        HEADER,
        "|" + "---|" * 12,
    ]
    for row in verdict.rows:
        share = f"{row.peak_gib / row.capacity_gib:.0%}" + ("" if row.fits else " DOES NOT FIT")
        gib = " | ".join(f"{x:.3g}" for x in (row.arguments_gib, row.temporaries_gib, row.others_gib, row.peak_gib))
        lines.append(f"| {row.program} | {gib} | {share} | {_cost(row.cost)} | {row.compile_s:.0f} |")
        lines += [f"| {row.program}: {part.name} | | | | | | {_cost(part)} | |" for part in row.parts]
    lines += ["", "resident, GiB per device: " + ", ".join(f"{name} {size:.3g}" for name, size in verdict.resident.items())]
    sync = next((row for row in verdict.rows if row.program == "sync"), None)
    if sync is not None and not sync.error:
        moved = sum(size for _, size in sync.cost.collectives.values()) / GIB
        lines.append(f"weights from training to decoding: {moved:.3g} GiB reach each device over the links, once an iteration")
    worst = max(verdict.rows, key=lambda row: row.peak_gib / row.capacity_gib)
    lines.append(
        f"verdict: {'fits' if verdict.fits else 'DOES NOT FIT'}; the worst program is {worst.program} with "
        f"{worst.peak_gib:.3g} of {worst.capacity_gib:.2f} GiB ({worst.peak_gib / worst.capacity_gib:.0%})"
    )
    refused = [row for row in verdict.rows if row.error]
    lines += [f"{row.program}: the compiler refuses it: {row.error}" for row in refused]
    lines += [f"  change {each}" for each in verdict.advice]
    return "\n".join(lines)


def _cost(cost: Cost) -> str:
    moves = ", ".join(f"{kind} {n} {size / GIB:.3g}" for kind, (n, size) in cost.collectives.items()) or "none"
    figures = f"{cost.bytes / 1e9:.3g} | {moves} | {cost.seconds:.3g}" if math.isfinite(cost.seconds) else "? | ? | ?"
    return f"{cost.flops / 1e12:.3g} | {figures} | {cost.bound}"
