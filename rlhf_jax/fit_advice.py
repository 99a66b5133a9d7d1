"""What to change in a run that does not fit: three keys, from what to what."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from rlhf_jax import checks, ops


class Need(NamedTuple):
    """The program that lacks most, on one device, GiB."""

    program: str
    fixed: float  # what lies in memory whatever the program does: its arguments and the other models
    temporary: float
    capacity: float


class Advice(NamedTuple):
    key: str
    old: Any
    new: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new} ({self.why})"


def advise(need: Need, stage: str, run: Any, mesh: dict[str, int]) -> list[Advice]:
    """The three keys that bring the program under the capacity soonest, each by as much as it takes alone where it can.

    Args:
      stage: names the group of the algorithm's keys in an online run.
      mesh: sizes of the axes data, fsdp, tensor.
    """
    room = need.capacity - need.fixed
    if room <= 0:
        factor = _doublings(need.fixed, 0.8 * need.capacity)
        why = f"weights and optimisers alone need {need.fixed:.1f} of {need.capacity:.1f} GiB"
        return list(_less_weight(run, mesh, factor, why))[:3]
    factor = _doublings(need.temporary, 0.9 * room)
    why = f"temporaries need {need.temporary:.1f} of {room:.1f} GiB"
    return list(_less_temporary(need.program, stage, run, mesh, factor, why))[:3]


def _doublings(size: float, room: float) -> int:
    factor = 2
    while size / factor > room:
        factor *= 2
    return factor


def _less_weight(run: Any, mesh: dict[str, int], factor: int, why: str) -> Iterator[Advice]:
    yield Advice("mesh.fsdp", mesh["fsdp"], mesh["fsdp"] * factor, f"{factor} times the devices: {why}")
    if run.model.lora is None:
        yield Advice("model.lora", None, "{rank: 16}", "one frozen base under adapters, and optimisers for these alone")
    if run.model.param_dtype == "float32":
        yield Advice("model.param_dtype", "float32", "bfloat16", "half the weights, half the optimiser")
    if run.model.compute_dtype == "float32":
        yield Advice("model.compute_dtype", "float32", "bfloat16", "half of every frozen model, and of the copy for decoding")
    yield Advice("mesh.tensor", mesh["tensor"], mesh["tensor"] * 2, "twice the devices: half the copy for decoding")


def _less_temporary(program: str, stage: str, run: Any, mesh: dict[str, int], factor: int, why: str) -> Iterator[Advice]:
    minibatches, micro = checks.splits(run)
    rows = run.batch_size // (mesh["data"] * mesh["fsdp"])  # of one device
    if program in ("learn", "update"):
        key = "micro_batches" if program == "update" else f"{stage}.micro_batches"
        yield from _multiplied(key, micro, factor, rows // minibatches, why)
        if run.model.remat != "full":
            yield Advice("model.remat", run.model.remat, "full", "keeps one state a layer and computes the rest again")
        if run.model.attention == "dense":
            yield Advice("model.attention", "dense", "flash", "no [T, T] scores")
    if program in ("score", "reward"):
        yield from _multiplied("score_parts", run.score_parts, factor, rows, why)
    if program in ("score", "learn", "update", "evaluate"):
        chunk = run.model.logprob_chunk or ops.CHUNK
        yield from _divided("model.logprob_chunk", chunk, min(factor, 4), 1, "logits of fewer tokens at a time")
    if program in ("rollout", "answer", "greedy"):
        new = run.sampling.max_new_tokens
        yield from _divided("sampling.max_new_tokens", new, factor, 1, f"shorter key-value cache: {why}")
    yield from _divided("batch_size", run.batch_size, factor, run.batch_size // rows * minibatches * micro, why)
    yield Advice("mesh.fsdp", mesh["fsdp"], mesh["fsdp"] * factor, f"{factor} times the devices: {why}")
    yield Advice("mesh.tensor", mesh["tensor"], mesh["tensor"] * 2, "twice the devices: half of every activation that is split")


def _multiplied(key: str, old: int, factor: int, most: int, why: str) -> Iterator[Advice]:
    new = min(old * factor, most)
    if new > old:
        yield Advice(key, old, new, why)


def _divided(key: str, old: int, factor: int, least: int, why: str) -> Iterator[Advice]:
    new = max(old // factor, least)
    if new < old:
        yield Advice(key, old, new, why)
