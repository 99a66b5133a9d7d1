"""Rotary positions: `config.json`, in either generation's spelling, -> `Rope`; `Rope` and positions -> cos and sin."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.spec import Rope, Spec


def make_rope(parameters: dict[str, Any], dims: int, *, theta: float, max_length: int) -> Rope:
    """The frequencies of one kind of rope, computed in float32 as transformers computes them.

    Args:
        parameters: `rope_parameters` (transformers 5) or `rope_scaling` (4) of one kind of layer; {} is the plain rope.
        dims: dims of a head that turn.
        theta: base, where `parameters` do not give it.
        max_length: `max_position_embeddings`, tokens.
    Raises:
        UserError: the kind is unknown, or lacks a key it needs.
    Source: transformers 5.23, modeling_rope_utils; llama3: Llama 3.1; yarn: arXiv 2309.00071; longrope: arXiv 2402.13753.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = float(parameters.get("rope_theta") or theta)
    powers = np.float32(theta) ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims))
    inv_freq = (np.float32(1) / powers).astype(np.float32)
    original = parameters.get("original_max_position_embeddings") or max_length
    if kind in ("linear", "dynamic", "llama3") and parameters.get("factor") is None:
        raise UserError(f"config.json: rope of type {kind!r} has no factor; add it to rope_parameters (rope_scaling)")
    if kind in ("dynamic", "longrope", "su") and not max_length:
        raise UserError(
            f"config.json: rope of type {kind!r} depends on the length, and there is no max_position_embeddings; add it"
        )
    match kind:
        case "default":
            return Rope(inv_freq=_tuple(inv_freq))
        case "linear":
            return Rope(inv_freq=_tuple(inv_freq / np.float32(parameters["factor"])))
        case "dynamic":
            ntk = (theta, float(parameters["factor"]), dims)
            return Rope(inv_freq=_tuple(inv_freq), original_length=max_length, dynamic=ntk)
        case "llama3":
            return Rope(inv_freq=_tuple(_llama3(inv_freq, parameters, original)))
        case "yarn":
            return _yarn(powers, parameters, dims, theta, original, max_length)
        case "longrope" | "su":
            return _longrope(powers, parameters, original, max_length)
    raise UserError(
        f"config.json: rope type {kind!r} is not supported; known are default, linear, dynamic, llama3, yarn and longrope"
    )


def from_config(config: dict[str, Any], dims: int, *, theta: float = 10000.0, layer_type: str | None = None) -> Rope:
    """The rope of one kind of layer, read from `config.json` as transformers 5 or 4 writes it.

    Args:
        dims: dims of a head that turn.
        theta: base, where the config is silent.
        layer_type: key of a nested `rope_parameters`, "full_attention" or "sliding_attention".
    """
    parameters = parameters_of(config, layer_type)
    theta = config.get("rope_theta") or theta
    original = config.get("original_max_position_embeddings")  # Phi-3 has it here, and it beats the nested one
    if original:
        parameters = parameters | {"original_max_position_embeddings": original}
    return make_rope(parameters, dims, theta=theta, max_length=config.get("max_position_embeddings") or 0)


def parameters_of(config: dict[str, Any], layer_type: str | None = None) -> dict[str, Any]:
    """The rope of one kind of layer, where both generations' keys may be there.

    As in transformers 5 (`convert_rope_params_to_dict`) `rope_scaling` stands in for `rope_parameters`; of ropes by kind of
    layer it changes that of full attention, and it never concerns a layer with a window.
    """
    newer, older = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if layer_type == "sliding_attention":
        older = {}
    if layer_type in newer:
        return (newer[layer_type] or {}) | older
    return older or newer


def partial(config: dict[str, Any], default: float = 1.0) -> float:
    """Share of a head's dims that turn."""
    nested = parameters_of(config).get("partial_rotary_factor")
    found = nested if nested is not None else config.get("partial_rotary_factor")
    return default if found is None else float(found)


def cos_sin(rope: Rope | None, positions: jax.Array, dims: int, length: jax.Array, bound: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of positions f32[B, T, dims / 2]; pairs that do not turn have cos 1, sin 0.

    Args:
        positions: i32[B, T].
        dims: dims of a head that turn in any layer of the model; a rope with fewer leaves the rest alone.
        length: i32[], tokens of the longest row, for the ropes whose frequencies depend on it; bound: no length exceeds it.
    """
    shape = (*positions.shape, dims // 2)
    if rope is None:
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    # Elementwise, and in float32 whatever the model's dtype: bfloat16 angles are off by 7 radians at position 4096.
    angles = positions.astype(jnp.float32)[..., None] * at_length(rope, length, bound)[None, None]
    return jnp.cos(angles) * rope.factor, jnp.sin(angles) * rope.factor


def at_length(rope: Rope, length: jax.Array | int, bound: int | None = None) -> jax.Array:
    """Frequencies f32[dims / 2] for sequences of this many tokens, as transformers chooses them for the longest row."""
    inv_freq = jnp.asarray(rope.inv_freq, jnp.float32)
    if rope.original_length is None or (bound is not None and bound <= rope.original_length):
        return inv_freq
    if rope.dynamic is None:
        longer = jnp.asarray(rope.long_inv_freq, jnp.float32)
    else:
        theta, factor, dims = rope.dynamic
        # Below original_length the stretch may be negative, and its power not a number.
        stretch = jnp.maximum(factor * jnp.asarray(length, jnp.float32) / rope.original_length - (factor - 1), 1.0)
        base = theta * stretch ** (dims / (dims - 2))
        longer = 1.0 / base ** (jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    return jnp.where(length > rope.original_length, longer, inv_freq)


def depends_on_length(rope: Rope | None) -> bool:
    """True for dynamic and longrope."""
    return rope is not None and rope.original_length is not None


def at_fixed_length(spec: Spec, length: int) -> Spec:
    """The spec with ropes that hold for sequences of up to `length` tokens, whatever a batch contains.

    transformers chooses the frequencies of dynamic and longrope by the longest row of each batch. In training that makes a
    row's log-probabilities depend on its neighbours, and in sampling it forbids a cache; so a run fixes the length.
    """

    def fixed(rope: Rope | None) -> Rope | None:
        if rope is None or rope.original_length is None:
            return rope
        return Rope(inv_freq=_tuple(np.asarray(at_length(rope, length))), factor=rope.factor)

    return dataclasses.replace(spec, layers=tuple(dataclasses.replace(x, rope=fixed(x.rope)) for x in spec.layers))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, pairs: str) -> jax.Array:
    """Turn the first dims of every head: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: [B, T, heads, head_dim]; cos, sin: f32[B, T, dims / 2].
        pairs: "halves" turns dim i with dim i + dims / 2, "neighbours" dim 2 i with dim 2 i + 1.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if pairs == "halves":
        a, b = turned[..., :half], turned[..., half:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1) if rest.shape[-1] else turned.astype(x.dtype)


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, values.astype(np.float32)))


def _llama3(inv_freq: np.ndarray, parameters: dict, original: int) -> np.ndarray:
    """Long waves are slowed by factor, short ones kept, those between interpolated."""
    factor, low, high = (np.float32(parameters[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(original) / waves - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    slowed = np.where(waves > original / low, inv_freq / factor, inv_freq)
    return np.where((waves >= original / high) & (waves <= original / low), between, slowed)


def _yarn(powers: np.ndarray, parameters: dict, dims: int, theta: float, original: int, max_length: int) -> Rope:
    factor = float(parameters.get("factor") or max_length / original)

    def dim_of(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(parameters.get("beta_fast") or 32), dim_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = (np.arange(dims // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    keep = 1 - np.clip(ramp, 0, 1).astype(np.float32)
    inv_freq = 1 / (np.float32(factor) * powers) * (1 - keep) + 1 / powers * keep

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = parameters.get("attention_factor")
    if attention is None:
        one, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = mscale(one) / mscale(all_dims) if one and all_dims else mscale(1.0)
    return Rope(inv_freq=_tuple(inv_freq), factor=float(attention))


def _longrope(powers: np.ndarray, parameters: dict, original: int, max_length: int) -> Rope:
    factor = float(parameters.get("factor") or max_length / original)
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (np.asarray(parameters[k], np.float32) for k in ("short_factor", "long_factor"))
    if short.shape != powers.shape or long.shape != powers.shape:
        raise UserError(
            f"config.json: longrope has {len(short)} short and {len(long)} long factors; "
            f"it needs {len(powers)} of each, one for every pair of dims that turns"
        )
    return Rope(
        inv_freq=_tuple(1 / (short * powers)),
        long_inv_freq=_tuple(1 / (long * powers)),
        original_length=int(original),
        factor=float(attention),
    )
