"""What to change in a run that does not fit: three keys, from what to what, and the peak that each is expected to leave.

A peak is a sum of parts (`Need`), and every key acts on some of them. A key takes the smallest change with which all programs
are expected to fit; keys that manage it alone come first, those that change no result before those that do. The sums are what
the compiler said; how far temporaries follow a key is a rule of thumb, taken from the table of choices in docs/fit.md.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rlhf_jax import build, checks, config, ops

ROOM = 0.8  # of the capacity: what is expected to need more does not count as fitting; compiled, it was up to a third more
RANK = 16  # of an adapter where there is none yet
REMAT = {"none": 1.0, "elementwise": 0.5, "dots": 0.27, "save_attention": 0.13, "full": 0.12}  # activations that are kept
UPDATES, SCORES, ROLLOUTS = ("learn", "update"), ("score", "reward"), ("rollout", "answer", "greedy")


class Need(NamedTuple):
    """What one program finds or makes in the memory of one device, GiB."""

    program: str
    capacity: float
    temporary: float
    trained: float = 0.0  # what optimisers change
    moments: float = 0.0  # their optimisers' states, float32
    reference: float = 0.0
    reward: float = 0.0
    base: float = 0.0  # under adapters
    copy: float = 0.0  # of the weights for decoding
    rest: float = 0.0  # batches, results
    gradient: float = 0.0  # float32, of the largest model that is trained: part of an update's temporaries

    @property
    def peak(self) -> float:
        return sum(self[2:-1])


class Advice(NamedTuple):
    key: str
    old: Any
    new: Any
    alone: bool  # expected to be enough by itself
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new} ({self.why})"


class Change(NamedTuple):
    """A key, values to try (the smallest change first; the run may refuse some), and what a value leaves of a need."""

    key: str
    old: Any
    values: list[Any]
    effect: Callable[[Need, Any], Need]
    why: str


class Shape(NamedTuple):
    """What advice must know of a model."""

    vocabulary: int
    width: int
    heads: int  # what mesh.tensor must divide; mesh.fsdp must divide the width
    cache: float  # GiB of keys and values of a whole rollout on one device


def advise(needs: list[Need], stage: str, run: Any, mesh: dict[str, int], shape: Shape) -> list[Advice]:
    """The three keys that bring every program under the capacity soonest, each by as much as it takes alone where it can.

    Args:
      stage: names the group of the algorithm's keys in an online run.
      mesh: sizes of the axes data, fsdp, tensor.
    """
    found = []
    run = dataclasses.replace(run, mesh=config.Mesh(**mesh))
    for change in _changes(stage, run, mesh, shape):
        values = [value for value in change.values if _accepts(run, change.key, value)]
        left = [[change.effect(need, value) for need in needs] for value in values]
        ratios = [max(need.peak / need.capacity for need in each) for each in left]
        if not ratios:
            continue
        best = next((i for i, ratio in enumerate(ratios) if ratio <= ROOM), ratios.index(min(ratios)))
        new, ratio, worst = values[best], ratios[best], max(left[best], key=lambda need: need.peak / need.capacity)
        why = f"{change.why}; then about {worst.peak:.3g} of {worst.capacity:.2f} GiB, in {worst.program}"
        found.append((ratio, Advice(change.key, change.old, new, ratio <= ROOM, why)))
    before = max(need.peak / need.capacity for need in needs)
    alone = [advice for _, advice in found if advice.alone]
    others = sorted((each for each in found if ROOM < each[0] < 0.995 * before), key=lambda each: each[0])
    return [*alone, *(advice for _, advice in others)][:3]


def _accepts(run: Any, key: str, value: Any) -> bool:
    """False where the run would refuse the key's new value."""

    def changed(group: Any, names: list[str]) -> Any:
        if not names:
            return config.Lora(**value) if isinstance(value, dict) else value
        return dataclasses.replace(group, **{names[0]: changed(getattr(group, names[0]), names[1:])})

    wrong = {problem.key for problem in checks.find_problems(changed(run, key.split(".")))}
    return wrong <= {problem.key for problem in checks.find_problems(run)}


def _changes(stage: str, run: Any, mesh: dict[str, int], shape: Shape) -> Iterator[Change]:
    yield from _same_results(stage, run, mesh, shape)
    yield from _other_results(stage, run, shape)
    yield from _other_machines(mesh, shape)


def _same_results(stage: str, run: Any, mesh: dict[str, int], shape: Shape) -> Iterator[Change]:
    """Keys that change time and memory alone."""
    minibatches, micro = checks.splits(run)
    rows = run.batch_size // (mesh["data"] * mesh["fsdp"])  # of one device
    model, online = run.model, hasattr(run, "sampling")
    if online:
        parts = _doubled(run.score_parts)
        yield Change("score_parts", run.score_parts, parts, _split(SCORES, run.score_parts), "fewer rows scored at a time")
        at_once = run.sampling.rows or run.batch_size
        cached = lambda need, new: _less_cache(need, new / at_once, shape)  # noqa: E731
        yield Change("sampling.rows", run.sampling.rows, _halved(at_once), cached, "fewer prompts answered at a time")
    less = [name for name in REMAT if REMAT[name] < REMAT[model.remat] and name != "save_attention"]
    if less:
        why = "keeps less of each layer and computes it again"
        yield Change("model.remat", model.remat, less, _activations(lambda new: REMAT[new] / REMAT[model.remat]), why)
    if model.attention == "dense":
        yield Change("model.attention", "dense", ["flash"], _activations(lambda _: 0.9), "no [T, T] scores")
    key = f"{stage}.micro_batches" if online else "micro_batches"
    extra = 2.0 if micro == 1 else 0.0  # gradients that are summed lie beside those of the part
    yield Change(
        key, micro, _doubled(micro), _activations(lambda new: micro / new, extra), "fewer rows at a time; gradients are summed"
    )
    chunk = model.logprob_chunk or ops.CHUNK
    logits = rows * chunk * shape.vocabulary / mesh["tensor"] * 4 / 2**30

    def fewer_logits(need: Need, new: int) -> Need:
        at_once = minibatches * micro if need.program in UPDATES else getattr(run, "score_parts", 1)
        saved = logits / at_once * (1 - new / chunk) * (need.program in (*UPDATES, "score", "evaluate"))
        return need._replace(temporary=max(need.temporary - saved, 0.5 * need.temporary))

    yield Change(
        "model.logprob_chunk", chunk, [chunk // 2, chunk // 4] if chunk >= 4 else [], fewer_logits, "fewer logits at a time"
    )
    aside = [name for name in ("reference", "reward") if name not in model.offload]
    if online and aside:
        values = [(*model.offload, *aside)]
        used = {"score": ("reference",), "reward": ("reward",)}
        if "kl" in build.algorithm(stage, run).needs:
            used["learn"] = ("reference",)
        yield Change("model.offload", model.offload, values, _parked(used), "they wait in the host's memory")


def _other_results(stage: str, run: Any, shape: Shape) -> Iterator[Change]:
    """Keys that change what is learnt, on the same machine."""
    minibatches, _ = checks.splits(run)
    model, sampling = run.model, getattr(run, "sampling", None)
    if model.compute_dtype == "float32":
        half = lambda need, _: need._replace(  # noqa: E731
            reference=need.reference / 2, reward=need.reward / 2, base=need.base / 2, copy=need.copy / 2,
            temporary=need.temporary / 2 if need.program == "sync" else _less(need, 0.5).temporary,
        )  # fmt: skip
        yield Change("model.compute_dtype", "float32", ["bfloat16"], half, "half of activations, frozen models, decoding copy")
    if sampling is not None:
        why, values = "smaller optimiser steps, and more of them", _doubled(minibatches)
        yield Change(f"{stage}.minibatches", minibatches, values, _activations(lambda new: minibatches / new), why)
        longest, prompt = sampling.max_new_tokens, run.data.max_prompt_tokens

        def shorter(need: Need, new: int) -> Need:
            part = (prompt + new) / (prompt + longest)
            return _less_cache(need, part, shape) if need.program in ROLLOUTS else _less(need, part)

        yield Change("sampling.max_new_tokens", longest, _halved(longest)[:2], shorter, "shorter answers")

    def smaller(need: Need, new: int) -> Need:
        part = new / run.batch_size
        if need.program in ROLLOUTS and sampling.rows is not None:  # these stay as many
            return need._replace(rest=part * need.rest)
        return _less(need, part)

    yield Change("batch_size", run.batch_size, _halved(run.batch_size), smaller, "fewer rows")
    if model.lora is None:
        word = 0.5 if model.compute_dtype == "bfloat16" else 1.0
        share = min(2 * RANK / shape.width, 1.0)  # of an adapter in its matrix

        def adapted(need: Need, _: Any) -> Need:
            own = {name: share * getattr(need, name) for name in ("trained", "moments", "gradient")}
            temporary = max(need.temporary - (1 - share) * need.gradient * (need.program in UPDATES), 0.0)
            base = need.base + word * need.gradient
            return need._replace(**own, reference=0.0, base=base, copy=(1 + share) * need.copy, temporary=temporary)

        yield Change("model.lora", None, [{"rank": RANK}], adapted, "one frozen base under adapters, optimisers for these alone")


def _other_machines(mesh: dict[str, int], shape: Shape) -> Iterator[Change]:
    def wider(need: Need, new: int) -> Need:
        f = mesh["fsdp"] / new
        whole = need.temporary if need.program == "sync" else f * need.temporary  # gathered: as large as the copy
        split = {
            name: f * getattr(need, name) for name in ("trained", "moments", "reference", "reward", "base", "gradient", "rest")
        }
        return need._replace(temporary=whole, **split)

    def taller(need: Need, new: int) -> Need:
        f = mesh["tensor"] / new
        part = f if need.program == "sync" else (1 + f) / 2
        names = ("trained", "moments", "reference", "reward", "base", "gradient", "copy")
        return need._replace(temporary=part * need.temporary, **{name: f * getattr(need, name) for name in names})

    wide = [size for size in _doubled(mesh["fsdp"]) if shape.width % size == 0]
    yield Change("mesh.fsdp", mesh["fsdp"], wide, wider, "as many times the devices")
    tall = [size for size in _doubled(mesh["tensor"]) if shape.heads % size == 0]
    yield Change("mesh.tensor", mesh["tensor"], tall, taller, "as many times the devices, or fewer for mesh.fsdp")


def _doubled(old: int) -> list[int]:
    return [old * 2**n for n in range(1, 12)]


def _halved(old: int) -> list[int]:
    return [old // 2**n for n in range(1, 8) if old % 2**n == 0]


def _less_cache(need: Need, factor: float, shape: Shape) -> Need:
    """A part of the keys and values of a rollout."""
    saved = (1 - factor) * shape.cache * (need.program in ROLLOUTS)
    return need._replace(temporary=max(need.temporary - saved, 0.0))


def _less(need: Need, factor: float) -> Need:
    """A part of the rows or of their length: activations, caches and batches shrink, gradients do not."""
    if need.program == "sync":
        return need
    return need._replace(temporary=_floor(need) + factor * (need.temporary - _floor(need)), rest=factor * need.rest)


def _floor(need: Need) -> float:
    return min(2.25 * need.gradient, need.temporary) if need.program in UPDATES else 0.0


def _activations(factor: Callable[[Any], float], extra: float = 0.0) -> Callable[[Need, Any], Need]:
    """Acts on an update's temporaries beside its gradients, and costs `extra` times these."""

    def effect(need: Need, new: Any) -> Need:
        if need.program not in UPDATES:
            return need
        left = _less(need, factor(new))
        return need._replace(temporary=left.temporary + extra * need.gradient)

    return effect


def _split(programs: tuple[str, ...], old: int) -> Callable[[Need, int], Need]:
    return lambda need, new: need._replace(temporary=need.temporary * old / new) if need.program in programs else need


def _parked(used: dict[str, tuple[str, ...]]) -> Callable[[Need, tuple[str, ...]], Need]:
    """A program brings the parked models that it uses to the device: what it does not use is saved."""

    def effect(need: Need, new: tuple[str, ...]) -> Need:
        gone = [name for name in ("reference", "reward") if name in new and name not in used.get(need.program, ())]
        return need._replace(**dict.fromkeys(gone, 0.0))

    return effect
