"""Rules between and about the values of a configuration that need no device: ranges, sizes that must divide, either-or keys.

`find_problems` names every broken rule with its key, its arithmetic and the nearest values that would do. What depends on the
number of devices is `check_batch`, which the loops call when they know the mesh.
"""

import dataclasses
import json
import math
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
        low = f"{'above' if self.low_open else 'at least'} {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high:g}"


COUNT = Range(low=1)
NOT_NEGATIVE = Range(low=0)
POSITIVE = Range(low=0, low_open=True)
FRACTION = Range(low=0, high=1)
FRACTION_BELOW_1 = Range(low=0, high=1, high_open=True)
BETWEEN_0_AND_1 = Range(low=0, high=1, low_open=True, high_open=True)

RANGES: dict[type, dict[str, Range]] = {
    c.Run: {"seed": Range(low=0, high=2**31 - 1), "steps": COUNT, "batch_size": COUNT},
    c.SFTRun: {"micro_batches": COUNT},
    c.RewardRun: {"micro_batches": COUNT},
    c.PPORun: {"score_parts": COUNT},
    c.Lora: {"rank": COUNT, "alpha": POSITIVE},
    c.Scratch: {
        "width": COUNT,
        "layers": COUNT,
        "heads": COUNT,
        "kv_heads": COUNT,
        "mlp_width": COUNT,
        "max_length": COUNT,
        "rope_theta": POSITIVE,
        "vocabulary": Range(low=8),
    },
    c.Model: {"logprob_chunk": COUNT},
    c.Optimizer: {
        "learning_rate": NOT_NEGATIVE,
        "warmup_steps": NOT_NEGATIVE,
        "final_fraction": FRACTION,
        "beta1": FRACTION_BELOW_1,
        "beta2": FRACTION_BELOW_1,
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "clip_norm": POSITIVE,
    },
    c.Sampling: {
        "max_new_tokens": COUNT,
        "min_new_tokens": NOT_NEGATIVE,
        "temperature": NOT_NEGATIVE,
        "top_k": NOT_NEGATIVE,
        "top_p": Range(low=0, high=1, low_open=True),
        "min_p": FRACTION_BELOW_1,
        "repetition_penalty": POSITIVE,
    },
    c.Source: {"weight": POSITIVE},
    c.Data: {
        "max_prompt_tokens": COUNT,
        "max_tokens": Range(low=2),
        "eval_fraction": FRACTION_BELOW_1,
        "limit": COUNT,
    },
    c.Reward: {"timeout_s": POSITIVE},
    c.AdaptiveKL: {"target": POSITIVE, "horizon": POSITIVE},
    c.PPO: {
        "epochs": COUNT,
        "minibatches": COUNT,
        "micro_batches": COUNT,
        "gamma": FRACTION,
        "lam": FRACTION,
        "clip_low": BETWEEN_0_AND_1,
        "clip_high": POSITIVE,
        "dual_clip": Range(low=1, low_open=True),
        "value_clip": POSITIVE,
        "kl_coef": NOT_NEGATIVE,
        "reward_clip": POSITIVE,
        "missing_eos_penalty": NOT_NEGATIVE,
        "entropy_coef": NOT_NEGATIVE,
        "kl_stop": POSITIVE,
        "critic_warmup": NOT_NEGATIVE,
        "ptx_coef": NOT_NEGATIVE,
        "ema_decay": BETWEEN_0_AND_1,
    },
    c.RewardModelLoss: {"centering_coef": NOT_NEGATIVE, "label_smoothing": Range(low=0, high=0.5, high_open=True)},
    c.Save: {"every": NOT_NEGATIVE, "keep_last": COUNT, "keep_every": COUNT},
    c.Log: {"every": COUNT, "eval_every": NOT_NEGATIVE, "eval_prompts": NOT_NEGATIVE},
}


def find_problems(config: Any) -> list[Problem]:
    """Every broken rule of a configuration, as (dotted key, message)."""
    out_of_range = list(_ranges(config, ""))
    problems = [Problem(key, text) for key, text, _ in out_of_range]
    if any(rule is COUNT for *_, rule in out_of_range) or not isinstance(config, c.Run):
        return problems  # the rules below divide by counts
    problems += _model(config.model, config.mesh)
    problems += _data(config.data, "data")
    problems += _batch(config)
    problems += _lengths(config)
    if isinstance(config, c.PPORun):
        problems += _ppo(config)
        problems += _reward(config)
    return problems


def _ranges(config: Any, prefix: str) -> Iterator[tuple[str, str, Range]]:
    rules: dict[str, Range] = {}
    for cls in type(config).__mro__:
        rules = RANGES.get(cls, {}) | rules
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        rule = rules.get(field.name)
        if rule is not None and value is not None and not rule.holds(value):
            yield name, f"{name} is {value:g}; it must be {rule.words()}", rule
        for key, item in enumerate(value) if isinstance(value, tuple) else [("", value)]:
            if dataclasses.is_dataclass(item):
                yield from _ranges(item, f"{name}.{key}." if key != "" else f"{name}.")


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


def splits(config: c.Run) -> tuple[int, int]:
    """(minibatches, micro-batches) that a batch of this run is cut into."""
    if isinstance(config, c.PPORun):
        return config.ppo.minibatches, config.ppo.micro_batches
    return 1, getattr(config, "micro_batches", 1)


def check_batch(config: c.Run, ways: int) -> None:
    """UserError if the batch does not divide over minibatches, micro-batches and `ways` = data x fsdp devices of the mesh."""
    text = batch_problem(config.batch_size, *splits(config), ways)
    if text:
        raise UserError(text)


def _batch(config: c.Run) -> Iterator[Problem]:
    ways = max(config.mesh.data, 1) * max(config.mesh.fsdp, 1)
    text = batch_problem(config.batch_size, *splits(config), ways)
    if text:
        yield Problem("batch_size", text)
    parts = getattr(config, "score_parts", 1)
    if config.batch_size % parts:
        yield Problem(
            "score_parts", f"score_parts is {parts}; it must divide batch_size; these do: {_list(_divisors(config.batch_size))}"
        )


def _lengths(config: c.Run) -> Iterator[Problem]:
    context = model_fact(config.model, "context")
    key, length, words = "data.max_tokens", config.data.max_tokens, f"data.max_tokens = {config.data.max_tokens}"
    if isinstance(config, c.PPORun):
        prompt, response = config.data.max_prompt_tokens, config.sampling.max_new_tokens
        key, length = "sampling.max_new_tokens", prompt + response
        words = f"data.max_prompt_tokens + sampling.max_new_tokens = {prompt} + {response} = {length}"
    if context is not None and length > context:
        yield Problem(key, f"{words}, but the model is made for {context} tokens; make them {length - context} shorter")


def _ppo(config: c.PPORun) -> Iterator[Problem]:
    sampling, ppo = config.sampling, config.ppo
    if sampling.temperature == 0:
        yield Problem(
            "sampling.temperature", "sampling.temperature is 0; PPO needs samples, so it must be above 0 (1 is the usual value)"
        )
    if sampling.min_new_tokens > sampling.max_new_tokens:
        yield Problem(
            "sampling.min_new_tokens",
            f"sampling.min_new_tokens is {sampling.min_new_tokens}; "
            f"it must be at most max_new_tokens = {sampling.max_new_tokens}",
        )
    if sampling.repetition_penalty != 1:
        yield Problem(
            "sampling.repetition_penalty",
            f"sampling.repetition_penalty is {sampling.repetition_penalty:g}; in PPO it must be 1, "
            "because the ratio would be that of another distribution than the one sampled",
        )
    if ppo.adaptive_kl is not None and ppo.kl_coef == 0:
        yield Problem("ppo.kl_coef", "ppo.kl_coef is 0 and ppo.adaptive_kl multiplies it; start above 0, such as 0.05")
    if ppo.critic_warmup > config.steps:
        yield Problem("ppo.critic_warmup", f"ppo.critic_warmup is {ppo.critic_warmup}; it must be at most steps = {config.steps}")
    if ppo.ptx_coef > 0 and config.ptx_data is None:
        yield Problem("ppo.ptx_coef", f"ppo.ptx_coef is {ppo.ptx_coef:g}, so ptx_data is needed; write ptx_data.path=FILE")
    if config.ptx_data is not None:
        yield from _data(config.ptx_data, "ptx_data")


def _reward(config: c.PPORun) -> Iterator[Problem]:
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
    keys = {
        "context": ("max_position_embeddings", "n_positions"),
        "heads": ("num_attention_heads", "n_head"),
    }[fact]
    found = [values[key] for key in keys if isinstance(values.get(key), int)]
    return found[0] if found else None


def _near(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _list(values: list[int]) -> str:
    return ", ".join(str(value) for value in values[:12]) + (", ..." if len(values) > 12 else "")
