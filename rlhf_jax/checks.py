"""Rules between and about the values of a configuration that need no device: ranges, sizes that must divide, either-or keys.

`find_problems` names every broken rule with its key, its arithmetic and the nearest values that would do; `check` raises them.
What depends on the number of devices is `check_batch`, which the loops call when they know the mesh.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax import config as c
from rlhf_jax.errors import UserError


class Problem(NamedTuple):
    """A broken rule. `key` is dotted; the message names key, value, rule and remedy."""

    key: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Allowed values: low <= x <= high, or < where open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def words(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low:.10g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high:.10g}"


_NAMELESS = re.compile("[\0\ud800-\udfff]")  # YAML can escape them, and no file has them in its name
COUNT = Range(low=1, high=2**31 - 1)  # programs count in int32
PAIR = Range(low=2)
NOT_NEGATIVE = Range(low=0)
POSITIVE = Range(low=0, low_open=True)
FRACTION = Range(low=0, high=1)
FRACTION_BELOW_1 = Range(low=0, high=1, high_open=True)
BETWEEN_0_AND_1 = Range(low=0, high=1, low_open=True, high_open=True)

# Keys mean the same in every group; where they do not, the group's class comes first.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("steps", "batch_size", "micro_batches", "minibatches", "epochs", "score_parts", "group_size"), COUNT),
    "GRPO.group_size": PAIR,
    "GSPO.group_size": PAIR,
    "RLOO.group_size": PAIR,
    "seed": Range(low=0, high=2**31 - 1),
    **dict.fromkeys(("width", "layers", "heads", "kv_heads", "mlp_width", "max_length", "logprob_chunk", "rank"), COUNT),
    "vocabulary": Range(low=8),
    **dict.fromkeys(("rope_theta", "alpha", "eps", "clip_norm"), POSITIVE),
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay"), NOT_NEGATIVE),
    **dict.fromkeys(("beta1", "beta2"), FRACTION_BELOW_1),
    "final_fraction": FRACTION,
    **dict.fromkeys(("max_new_tokens", "rows"), COUNT),
    **dict.fromkeys(("min_new_tokens", "temperature", "top_k"), NOT_NEGATIVE),
    "top_p": Range(low=0, high=1, low_open=True),
    "min_p": FRACTION_BELOW_1,
    "repetition_penalty": POSITIVE,
    "Source.weight": POSITIVE,
    **dict.fromkeys(("max_prompt_tokens", "limit"), COUNT),
    "length_buckets": Range(low=1, high=16),
    "max_tokens": Range(low=2),
    "eval_fraction": FRACTION_BELOW_1,
    "timeout_s": Range(low=0, low_open=True, high=1e6),  # a socket waits for 2**31 ms at most
    **dict.fromkeys(("target", "horizon"), POSITIVE),
    **dict.fromkeys(("gamma", "lam"), FRACTION),
    **dict.fromkeys(("clip_low", "ema_decay"), BETWEEN_0_AND_1),
    **dict.fromkeys(("clip_high", "value_clip", "reward_clip", "kl_stop"), POSITIVE),
    "dual_clip": Range(low=1, low_open=True),
    **dict.fromkeys(("kl_coef", "missing_eos_penalty", "entropy_coef", "critic_warmup", "ptx_coef"), NOT_NEGATIVE),
    **dict.fromkeys(("overlong_buffer", "overlong_penalty", "centering_coef"), NOT_NEGATIVE),
    "label_smoothing": Range(low=0, high=0.5, high_open=True),
    "beta": POSITIVE,
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), POSITIVE),
    "Save.every": NOT_NEGATIVE,
    "Log.every": COUNT,
    **dict.fromkeys(("keep_last", "keep_every", "eval_rows", "profile_step"), COUNT),
    **dict.fromkeys(("eval_every", "eval_prompts"), NOT_NEGATIVE),
    **dict.fromkeys(("max_bad_steps", "patience"), COUNT),
    **dict.fromkeys(("kl_nats", "ratio", "stall_factor", "stall_s"), POSITIVE),
    **dict.fromkeys(("entropy_nats", "score_std", "exit_s"), NOT_NEGATIVE),
}


def find_problems(config: Any) -> list[Problem]:
    """Every broken rule of a configuration, as (dotted key, message)."""
    out_of_range = list(_ranges(config, ""))
    problems = [Problem(key, text) for key, text, _ in out_of_range]
    if any(rule in (COUNT, PAIR, None) for *_, rule in out_of_range) or not isinstance(config, c.Run):
        return problems  # the rules below divide by counts, and look at files
    problems += _model(config.model, config.mesh)
    problems += _data(config.data, "data")
    problems += _batch(config)
    if config.log.profile_step is not None and config.log.profile_step > config.steps:
        text = f"log.profile_step is {config.log.profile_step}; it must be at most steps = {config.steps}"
        problems.append(Problem("log.profile_step", text))
    problems += _lengths(config)
    if isinstance(config, c.OnlineRun):
        problems += _online(config)
        problems += _reward(config)
    return problems


def check(config: c.Run) -> None:
    """UserError with all problems of a configuration, which may have been made in Python: a file's are told with their lines."""
    if problems := find_problems(config):
        raise UserError("\n".join(problem.text for problem in problems))


def range_of(cls: type, name: str) -> Range | None:
    """The allowed values of a key of a group."""
    return RANGES.get(f"{cls.__name__}.{name}", RANGES.get(name))


def _ranges(config: Any, prefix: str) -> Iterator[tuple[str, str, Range | None]]:
    """(key, message, rule) of every number out of its range, and of texts that name nothing: they have no rule."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        rule = range_of(type(config), field.name)
        if rule is not None and isinstance(value, int | float) and not rule.holds(value):
            yield name, f"{name} is {value:{'d' if isinstance(value, int) else 'g'}}; it must be {rule.words()}", rule
        if isinstance(value, str) and (not value or _NAMELESS.search(value)):
            yield name, f"{name} is {json.dumps(value)}, which is no name; write one, or leave the key out", None
        if dataclasses.is_dataclass(value):
            yield from _ranges(value, f"{name}.")
        for i, item in enumerate(value if isinstance(value, tuple) else ()):
            if dataclasses.is_dataclass(item):
                yield from _ranges(item, f"{name}.{i}.")


def _one_of(config: Any, names: tuple[str, ...], prefix: str, remedy: str) -> Iterator[Problem]:
    given = [f"{prefix}.{name}" for name in names if getattr(config, name) not in (None, ())]
    if len(given) != 1:
        what = " and ".join(given) + " are given" if given else "none is given"
        choices = ", ".join(f"{prefix}.{name}" for name in names)
        yield Problem(given[-1] if given else prefix, f"exactly one of {choices} is needed; {what}; {remedy}")


def _model(model: c.Model, mesh: c.Mesh) -> Iterator[Problem]:
    yield from _one_of(model, ("path", "scratch"), "model", "write model.path=DIRECTORY, or a group model.scratch")
    scratch = model.scratch
    if scratch is not None:
        width, heads, kv_heads = scratch.width, scratch.heads, scratch.kv_heads
        if width % heads or (width // heads) % 2:
            step = 2 * heads
            yield Problem(
                "model.scratch.width",
                f"model.scratch.width / heads = {width} / {heads} = {width / heads:g}; a head must have an even "
                f"whole width; nearest: {_near(width, step)}",
            )
        if heads % kv_heads:
            yield Problem(
                "model.scratch.kv_heads",
                f"model.scratch.kv_heads is {kv_heads}; it must divide heads = {heads}; these do: {_list(_divisors(heads))}",
            )
    if model.lora is not None and not model.lora.targets:
        yield Problem("model.lora.targets", "model.lora.targets is empty; name at least one matrix, such as [q, v]")
    heads = model_fact(model, "heads")
    if heads is not None and heads % max(mesh.tensor, 1):
        yield Problem(
            "mesh.tensor",
            f"mesh.tensor is {mesh.tensor}; it must divide the model's {heads} heads; these do: {_list(_divisors(heads))}",
        )
    sizes = {name: getattr(mesh, name) for name in ("data", "fsdp", "tensor")}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            yield Problem(f"mesh.{name}", f"mesh.{name} is {size}; it must be at least 1, or -1 for all devices that remain")
    if list(sizes.values()).count(-1) > 1:
        yield Problem(
            "mesh", f"mesh has {list(sizes.values()).count(-1)} sizes of -1 (all devices that remain); one at most can have it"
        )


def _data(data: c.Data, prefix: str) -> Iterator[Problem]:
    yield from _one_of(data, ("path", "sources", "task"), prefix, f"write {prefix}.path=FILE")
    if data.task_options and data.task is None:
        text = f"{prefix}.task_options belong to an embedded task and {prefix}.task is not given; name one, or remove them"
        yield Problem(f"{prefix}.task_options", text)


def batch_problem(batch_size: int, minibatches: int, micro_batches: int, ways: int) -> str | None:
    """What is wrong with a split of the batch over minibatches, micro-batches and `ways` = data x fsdp devices, or None."""
    unit = minibatches * micro_batches * ways
    if batch_size % unit == 0:
        return None
    parts = [f"{minibatches} minibatches"] * (minibatches > 1) + [f"{micro_batches} micro-batches"] * (micro_batches > 1)
    parts += [f"{ways} devices (mesh.data x mesh.fsdp)"] * (ways > 1)
    return (
        f"batch_size is {batch_size}; it must be a multiple of {' x '.join(parts)} = {unit} "
        f"({batch_size} / {unit} = {batch_size / unit:.4g}); nearest: {_near(batch_size, unit)}"
    )


def algorithm(config: c.OnlineRun) -> tuple[str, Any]:
    """The name and the value of a run's group of algorithm keys: ("ppo", config.ppo)."""
    name = next(name for name, cls in c.STAGES.items() if cls is type(config))
    return name, getattr(config, name)


def splits(config: c.Run) -> tuple[int, int]:
    """(minibatches, micro-batches) that a batch of this run is cut into."""
    if isinstance(config, c.OnlineRun):
        _, group = algorithm(config)
        return group.minibatches, group.micro_batches
    return 1, getattr(config, "micro_batches", 1)


def check_batch(config: c.Run, ways: int) -> None:
    """UserError if the batch does not divide over minibatches, micro-batches and `ways` = data x fsdp devices of the mesh."""
    text = batch_problem(config.batch_size, *splits(config), ways)
    text = text or _score_parts_problem(config, ways) or _rows_problem(config, ways)
    if text:
        raise UserError(text)


def _score_parts_problem(config: c.Run, ways: int) -> str | None:
    """What is wrong with the parts in which a batch is scored: each is split over `ways` devices."""
    parts, rows = getattr(config, "score_parts", 1), config.batch_size // ways
    if config.batch_size % parts:
        return f"score_parts is {parts}; it must divide batch_size; these do: {_list(_divisors(config.batch_size))}"
    if rows % parts:
        return (
            f"score_parts is {parts}; it must divide the {rows} rows of each of the {ways} devices (mesh.data x mesh.fsdp) that "
            f"split batch_size = {config.batch_size}; these do: {_list(_divisors(rows))}"
        )
    return None


def _rows_problem(config: c.Run, ways: int) -> str | None:
    """What is wrong with the rows that are decoded at a time, each shard of the batch having its share of them, or None."""
    if not isinstance(config, c.OnlineRun) or config.sampling.rows is None:
        return None
    name, group = algorithm(config)
    size, rows, batch = getattr(group, "group_size", 1), config.sampling.rows, config.batch_size
    unit = size * ways
    parts = [f"{name}.group_size {size}"] * (size > 1) + [f"{ways} devices (mesh.data x mesh.fsdp)"] * (ways > 1)
    if batch % unit:
        return (
            f"batch_size is {batch}; with sampling.rows it must be a multiple of {' x '.join(parts)} = {unit}; "
            f"nearest: {_near(batch, unit)}"
        )
    if rows % unit or rows > batch:
        multiple = f" and a multiple of {' x '.join(parts)} = {unit}" if parts else ""
        near = _near(rows, unit) if rows < batch else batch
        return f"sampling.rows is {rows}; it must be at most batch_size = {batch}{multiple}; nearest: {near}"
    return None


def _batch(config: c.Run) -> Iterator[Problem]:
    ways = max(config.mesh.data, 1) * max(config.mesh.fsdp, 1)
    text = batch_problem(config.batch_size, *splits(config), ways)
    if text:
        yield Problem("batch_size", text)
    text = None if text else _score_parts_problem(config, ways)
    if text:
        yield Problem("score_parts", text)
    text = _rows_problem(config, ways)
    if text:
        yield Problem("sampling.rows", text)
    if isinstance(config, (c.RewardRun, c.DPORun, c.KTORun)) and config.data.packing:
        yield Problem(
            "data.packing", "data.packing is for fine-tuning and for stages that sample; pairs are not packed: remove it"
        )
    if not isinstance(config, c.OnlineRun) and config.data.length_buckets != 1:
        text = f"data.length_buckets is {config.data.length_buckets}; widths are of prompts that are answered: remove it here"
        yield Problem("data.length_buckets", text)
    if isinstance(config, c.KTORun) and config.batch_size == 1:
        text = "batch_size is 1; kto pairs every prompt with another row's answer, so it must be at least 2"
        yield Problem("batch_size", text)


def _lengths(config: c.Run) -> Iterator[Problem]:
    context = model_fact(config.model, "context")
    key, length, words = "data.max_tokens", config.data.max_tokens, f"data.max_tokens = {config.data.max_tokens}"
    if isinstance(config, c.OnlineRun):
        prompt, response = config.data.max_prompt_tokens, config.sampling.max_new_tokens
        key, length = "sampling.max_new_tokens", prompt + response
        words = f"data.max_prompt_tokens + sampling.max_new_tokens = {prompt} + {response} = {length}"
    if context is not None and length > context:
        yield Problem(key, f"{words}, but the model is made for {context} tokens; make them {length - context} shorter")


def _online(config: c.OnlineRun) -> Iterator[Problem]:
    sampling, (name, group) = config.sampling, algorithm(config)
    if 0 <= sampling.temperature < c.COLDEST:
        rule = f"at least {c.COLDEST:g} (1 is the usual value)"
        text = f"sampling.temperature is {sampling.temperature:g}; {name} needs samples, so it must be {rule}"
        yield Problem("sampling.temperature", text)
    for key in ("min_new_tokens", "overlong_buffer"):
        where, value = (name, group) if key == "overlong_buffer" else ("sampling", sampling)
        if getattr(value, key, 0) > sampling.max_new_tokens:
            text = f"{where}.{key} is {getattr(value, key)}; it must be at most max_new_tokens = {sampling.max_new_tokens}"
            yield Problem(f"{where}.{key}", text)
    if sampling.repetition_penalty != 1:
        yield Problem(
            "sampling.repetition_penalty",
            f"sampling.repetition_penalty is {sampling.repetition_penalty:g}; in training it must be 1, "
            "because the ratio would be that of another distribution than the one sampled",
        )
    if getattr(group, "adaptive_kl", None) is not None and group.kl_coef == 0:
        text = f"{name}.kl_coef is 0 and {name}.adaptive_kl multiplies it; start above 0, such as 0.05"
        yield Problem(f"{name}.kl_coef", text)
    if getattr(group, "critic_warmup", 0) > config.steps:
        text = f"{name}.critic_warmup is {group.critic_warmup}; it must be at most steps = {config.steps}"
        yield Problem(f"{name}.critic_warmup", text)
    if config.data.packing:
        yield from _packing(config, name, group)
    size = getattr(group, "group_size", 1)
    if config.batch_size % size:
        near = _nearest(_divisors(config.batch_size), size)
        text = f"{name}.group_size is {size}; it must divide batch_size = {config.batch_size}; nearest: {near}"
        yield Problem(f"{name}.group_size", text)
    if size == 1 and getattr(group, "baseline", "") == "group":
        text = f"{name}.group_size is 1; {name}.baseline: group needs at least 2 answers per prompt"
        yield Problem(f"{name}.group_size", text)
    if group.ptx_coef > 0 and config.ptx_data is None:
        text = f"{name}.ptx_coef is {group.ptx_coef:g}, so ptx_data is needed; write ptx_data.path=FILE"
        yield Problem(f"{name}.ptx_coef", text)
    if config.ptx_data is not None:
        yield from _data(config.ptx_data, "ptx_data")


def _packing(config: c.OnlineRun, name: str, group: Any) -> Iterator[Problem]:
    if group.micro_batches == 1:
        rows = config.batch_size // group.minibatches
        text = (
            f"data.packing computes no more micro-batches than the sequences fill, and {name}.micro_batches is 1, so nothing "
            f"could be left out; set it to 8 or 16, a divisor of the {rows} answers of a minibatch"
        )
        yield Problem(f"{name}.micro_batches", text)
    if getattr(group, "compat", "none") != "none":
        text = (
            f"{name}.compat is {group.compat}, whose losses are means over one micro-batch, and data.packing puts other answers "
            "together; choose one of the two"
        )
        yield Problem("data.packing", text)


def _reward(config: c.OnlineRun) -> Iterator[Problem]:
    reward = config.reward
    if reward.model is None and reward.url is None and not reward.functions and config.data.task is None:
        yield Problem("reward", "no reward is given; write reward.model=DIRECTORY, reward.functions or reward.url")
    if reward.url is not None and not reward.url.startswith(("http://", "https://")):
        yield Problem("reward.url", f"reward.url is {reward.url}; it must start with http:// or https://")
    if reward.url is not None and "@" in reward.url.partition("//")[2].partition("/")[0]:
        yield Problem("reward.url", "reward.url holds a password, which would be stored with the run; take it out")


def model_fact(model: c.Model, fact: str) -> int | None:
    """context (tokens) or heads of the model, from `scratch` or its config.json; None where no such file is at hand."""
    if model.scratch is not None:
        return {"context": model.scratch.max_length, "heads": model.scratch.heads}[fact]
    path = Path(model.path or "") / "config.json"
    if model.path is None or not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object, is {type(values).__name__}; download it again")
    keys = {
        "context": ("max_position_embeddings", "n_positions"),
        "heads": ("num_attention_heads", "n_head"),
    }[fact]
    found = [values[key] for key in keys if isinstance(values.get(key), int)]
    return found[0] if found else None


def _near(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def _nearest(values: list[int], wanted: int) -> str:
    below, above = (max((v for v in values if v < wanted), default=None), min((v for v in values if v > wanted), default=None))
    return " or ".join(str(value) for value in (below, above) if value is not None)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _list(values: list[int]) -> str:
    return ", ".join(str(value) for value in values[:12]) + (", ..." if len(values) > 12 else "")
